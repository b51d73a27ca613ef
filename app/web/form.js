/** The request's own fields: what every lane of a comparison shares. */

import { byId, h } from "./dom.js";
import { dataUrl, readFile } from "./picture.js";

const LABELS = {
  width: "Width",
  height: "Height",
  num_inference_steps: "Steps",
  guidance_scale: "Scale",
  seed: "Seed",
  class_label: "Class",
  strength: "Strength",
  image_guidance_scale: "Picture scale",
  timestep_warp: "Warp",
  negative_prompt: "Negative prompt",
};

export class RequestForm {
  /** `state` is read and written in place; `onchange` after each edit, `onmodel` when another model is chosen. */
  constructor(state, { onchange, onmodel }) {
    this.state = state;
    this.onchange = onchange;
    this.onmodel = onmodel;
    this.fields = new Map();
    this.build();
  }

  build() {
    const prompt = byId("prompt");
    prompt.addEventListener("input", () => this.set("prompt", prompt.value));
    const error = h("p", { class: "error", id: "prompt-error", role: "alert" });
    prompt.after(error);
    prompt.setAttribute("aria-describedby", error.id);
    this.fields.set("prompt", { input: prompt, error, element: prompt.parentElement });
    byId("surprise").addEventListener("click", () => this.usePrompt(fromGrammar(this.model.prompt_grammar)));
    byId("examples").addEventListener("change", ({ target }) => this.usePrompt(target.value));
    this.dice = h("button", { type: "button", class: "quiet icon", "aria-label": "Another seed", title: "Another seed" }, "⟳");
    this.dice.addEventListener("click", () => this.assign("seed", Math.floor(Math.random() * 2 ** 31)));
    byId("settings").append(
      this.select("model", "Model"),
      h("div", { class: "size" }, this.number("width"), h("span", { "aria-hidden": "true" }, "×"), this.number("height")),
      this.number("num_inference_steps", { min: 1 }),
      this.number("guidance_scale", { step: "any" }),
      h("div", { class: "with-dice" }, this.number("seed", { min: 0 }), this.dice),
      this.select("scheduler", "Scheduler"),
      this.text("negative_prompt"),
      this.number("class_label", { min: 0 }),
      this.pictureField(),
    );
  }

  /** Fill the fields from the state, under the defaults of `model`. */
  show(models, model) {
    this.model = model;
    options(this.fields.get("model").input, models.map(({ id }) => id), model.id);
    options(this.fields.get("scheduler").input, model.schedulers, this.state.scheduler ?? model.default_scheduler);
    for (const [name, { input }] of this.fields) {
      if (!["model", "scheduler"].includes(name)) input.value = this.value(name) ?? "";
    }
    const byClass = model.conditioning === "class";
    for (const name of ["prompt", "negative_prompt"]) this.fields.get(name).input.disabled = byClass;
    this.fields.get("negative_prompt").element.hidden = byClass;
    this.fields.get("class_label").element.hidden = !byClass;
    this.fromPicture.hidden = !model.image_to_image;
    this.caption.textContent = model.edits ? "The picture to edit" : "Start from a picture";
    this.fields.get("strength").element.hidden = model.edits;
    this.fields.get("image_guidance_scale").element.hidden = !model.edits;
    const multiple = model.size_multiple;
    for (const name of ["width", "height"]) Object.assign(this.fields.get(name).input, { min: multiple, step: multiple });
    byId("model-note").textContent = model.prompt_grammar ? `${model.id} knows coloured shapes only.` : "";
    byId("surprise").hidden = !model.prompt_grammar;
    const examples = byId("examples");
    examples.replaceChildren(h("option", { value: "" }, "Examples"), ...model.examples.map((text) => h("option", { value: text }, text)));
    examples.hidden = model.examples.length === 0;
    this.showPicture();
  }

  value(name) {
    return this.state[name] ?? this.model.defaults[name] ?? null;
  }

  /** The body of a request: what is set or has a definite default, without nulls. */
  body() {
    const names = ["prompt", "model", "width", "height", "num_inference_steps", "guidance_scale", "seed", "scheduler"];
    const body = Object.fromEntries(names.map((name) => [name, this.value(name)]));
    body.model = this.model.id;
    if (this.model.conditioning === "class") Object.assign(body, { prompt: "", class_label: this.value("class_label") });
    body.prompt ??= "";
    if (this.state.guidance_scale === null) delete body.guidance_scale; // a student brings its own
    if (this.state.negative_prompt && this.model.conditioning !== "class") body.negative_prompt = this.state.negative_prompt;
    if (this.state.image) {
      const by = this.model.edits ? "image_guidance_scale" : "strength";
      Object.assign(body, { image: this.state.image, [by]: this.value(by) });
      if (this.state.timestep_warp !== null) body.timestep_warp = this.state.timestep_warp;
    }
    return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null && value !== undefined));
  }

  /** Show an error beside the field it names; false where it names none of these. */
  showError(param, message) {
    const field = this.fields.get(param.split(".")[0]);
    if (!field) return false;
    field.error.textContent = message;
    field.input.setAttribute("aria-invalid", "true");
    return true;
  }

  clearErrors() {
    for (const { input, error } of this.fields.values()) {
      error.textContent = "";
      input.removeAttribute("aria-invalid");
    }
  }

  /** Begin from a picture, or with null no longer. */
  async usePicture(file) {
    this.clearErrors();
    if (file && !["image/png", "image/jpeg", "image/webp"].includes(file.type)) {
      this.showError("image", `${file.name} is no PNG, JPEG or WebP.`);
      return;
    }
    this.state.image = file ? await readFile(file) : null;
    this.state.imageName = file ? file.name : null;
    this.showPicture();
    this.onchange();
  }

  assign(name, value) {
    this.fields.get(name).input.value = value;
    this.set(name, value);
  }

  set(name, value) {
    const field = this.fields.get(name);
    field.error.textContent = "";
    field.input.removeAttribute("aria-invalid");
    this.state[name] = value === "" && name !== "prompt" ? null : value;
    this.onchange();
  }

  usePrompt(text) {
    if (text) this.assign("prompt", text);
    byId("examples").value = "";
  }

  number(name, { min = null, step = 1 } = {}) {
    const input = h("input", { id: name, type: "number", min, step, inputmode: "decimal" });
    input.addEventListener("input", () => this.set(name, input.value === "" ? "" : Number(input.value)));
    return this.field(name, LABELS[name], input);
  }

  text(name) {
    const input = h("input", { id: name, type: "text", autocomplete: "off", placeholder: "none" });
    input.addEventListener("input", () => this.set(name, input.value));
    return this.field(name, LABELS[name], input);
  }

  select(name, label) {
    const input = h("select", { id: name });
    input.addEventListener("change", () => {
      this.set(name, input.value);
      if (name === "model") this.onmodel();
    });
    return this.field(name, label, input);
  }

  field(name, label, input) {
    const error = h("p", { class: "error", id: `${name}-error`, role: "alert" });
    input.setAttribute("aria-describedby", error.id);
    const element = h("div", { class: `field ${name}`, "data-field": name }, h("label", { for: name }, label), input, error);
    this.fields.set(name, { input, error, element });
    return element;
  }

  pictureField() {
    const input = h("input", { id: "image", type: "file", accept: "image/png,image/jpeg,image/webp", class: "hidden", tabindex: "-1", "aria-label": "Picture" });
    input.addEventListener("change", () => this.usePicture(input.files[0] ?? null));
    this.thumb = h("img", { alt: "", hidden: true });
    this.choose = h("button", { type: "button", id: "image-choose" }, "Choose or drop");
    this.choose.addEventListener("click", () => input.click());
    this.forget = h("button", { type: "button", class: "quiet icon", "aria-label": "No picture", hidden: true }, "×");
    this.forget.addEventListener("click", () => {
      input.value = "";
      this.usePicture(null);
    });
    const error = h("p", { class: "error", id: "image-error", role: "alert" });
    const numbers = ["strength", "image_guidance_scale", "timestep_warp"].map((name) => this.number(name, { min: 0, step: "any" }));
    this.strength = h("div", { class: "start", hidden: true }, ...numbers);
    this.caption = h("span", { class: "label", id: "image-label" });
    const row = h("div", { class: "picture", role: "group", "aria-labelledby": "image-label" }, this.thumb, this.choose, this.forget, input);
    const element = h("div", { class: "field image", "data-field": "image" }, this.caption, row, error);
    this.fields.set("image", { input: { value: "", setAttribute() {}, removeAttribute() {} }, error, element });
    this.fromPicture = h("div", { class: "from-picture" }, element, this.strength);
    return this.fromPicture;
  }

  showPicture() {
    const { image, imageName } = this.state;
    this.thumb.hidden = !image;
    this.forget.hidden = !imageName;
    this.strength.hidden = !image;
    if (image) this.thumb.src = dataUrl(image, imageName.split(".").pop().toLowerCase().replace("jpg", "jpeg"));
    this.choose.textContent = imageName ?? "Choose or drop";
    const lost = imageName && !image;
    this.fields.get("image").error.textContent = lost ? "A link does not carry the picture: choose it again." : "";
  }
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  select.value = chosen;
}

/** A prompt drawn from a model's grammar; words of a long list are not drawn twice. */
function fromGrammar({ templates, ...words }) {
  const bags = new Map();
  const draw = (name) => {
    const list = words[name] ?? words[`${name}s`] ?? [name];
    if (!bags.get(name)?.length) bags.set(name, shuffled(list));
    return list.length > 3 ? bags.get(name).pop() : list[Math.floor(Math.random() * list.length)];
  };
  const template = templates[Math.floor(Math.random() * templates.length)];
  return template.replaceAll(/\{(\w+)\}/g, (_, name) => draw(name));
}

function shuffled(list) {
  return list.map((item) => [Math.random(), item]).sort(([a], [b]) => a - b).map(([, item]) => item);
}
