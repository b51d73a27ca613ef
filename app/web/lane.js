/** One lane of a comparison: a composition of accelerators, its controls, and what came of it. */

import { h, measured, percent, quantity, seconds } from "./dom.js";
import { dataUrl, drawDifference, pixelsOf, psnr } from "./picture.js";
import { control, parameters, startingValues, usable } from "./schema.js";

export class Lane {
  /** `context`: `model()`, `accelerators()` (those that fit the model), `onchange`, `onremove(lane)`, `oncopy(lane)`. */
  constructor(accelerators, context) {
    this.accelerators = accelerators;
    this.context = context;
    this.result = null; // {body, pixels, alone, signature}
    this.build();
    this.refresh();
  }

  /** What goes into the request: nothing, one accelerator, or a list of them. */
  get acceleration() {
    return this.accelerators.length > 1 ? this.accelerators : this.accelerators[0];
  }

  get isReference() {
    return this.accelerators.every(({ mode }) => mode === "none");
  }

  get name() {
    return this.isReference ? "no acceleration" : this.accelerators.map(({ mode }) => mode).join(" + ");
  }

  build() {
    this.title = h("h2");
    this.subtitle = h("p", { class: "values" });
    this.picture = h("img", { alt: "", hidden: true });
    this.difference = h("canvas", { class: "difference", role: "img", hidden: true });
    this.underlay = h("img", { class: "underlay", alt: "", hidden: true });
    this.message = h("p", { class: "message" });
    this.stage = h("div", { class: "stage" }, this.picture, this.underlay, this.difference, this.message);
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.stepText = h("p", { class: "step" });
    this.facts = h("dl", { class: "facts" });
    this.parts = h("div", { class: "parts" });
    this.error = h("p", { class: "error", role: "alert" });
    this.details = h("details", {}, h("summary", {}, "Settings"), this.parts, this.error);
    const remove = h("button", { type: "button", class: "quiet icon", "aria-label": "Remove this lane" }, "×");
    remove.addEventListener("click", () => this.context.onremove(this));
    const copy = h("button", { type: "button", class: "quiet" }, "Copy as…");
    copy.addEventListener("click", () => this.context.oncopy(this));
    this.save = h("a", { class: "quiet", hidden: true }, "Save");
    this.element = h(
      "article",
      { class: "lane" },
      h("header", {}, this.title, this.subtitle, remove),
      h("figure", {}, this.stage, this.bar),
      this.stepText,
      this.facts,
      h("footer", {}, h("div", {}, this.save, copy), this.details),
    );
  }

  /** Draw title and controls anew, after the model or the composition changed. */
  refresh() {
    this.controls = [];
    this.parts.replaceChildren(...this.accelerators.map((a, at) => this.part(a, at)), this.composer());
    this.label();
  }

  label() {
    this.title.textContent = this.name;
    this.title.title = this.name;
    this.subtitle.textContent = this.isReference ? "every step in full" : this.values();
    this.subtitle.title = this.subtitle.textContent;
    this.element.setAttribute("aria-label", this.name);
    this.element.classList.toggle("reference", this.isReference);
    this.picture.alt = `Result of ${this.name}`;
  }

  /** What is set, and the first parameter where nothing is. */
  values() {
    const describe = (accelerator) => {
      const known = parameters(this.schemaOf(accelerator.mode), this.context.model());
      const shown = known.filter((p, at) => accelerator[p.name] !== undefined || (at === 0 && p.default != null));
      return shown.map((p) => `${p.name} ${accelerator[p.name] ?? p.default}`).join(", ");
    };
    return this.accelerators.map(describe).filter(Boolean).join(" · ") || "defaults";
  }

  schemaOf(mode) {
    return this.context.accelerators().find((a) => a.mode === mode)?.schema ?? {};
  }

  part(accelerator, at) {
    const { mode } = accelerator;
    const known = this.context.accelerators().find((a) => a.mode === mode);
    const made = parameters(this.schemaOf(mode), this.context.model()).map((parameter) => {
      const field = control(parameter, accelerator[parameter.name], (value) => {
        if (value === undefined) delete accelerator[parameter.name];
        else accelerator[parameter.name] = value;
        this.label();
        this.context.onchange();
      });
      this.controls.push({ at, mode, name: parameter.name, ...field });
      return field.element;
    });
    const remove = h("button", { type: "button", class: "quiet icon", "aria-label": `Remove ${mode}` }, "×");
    remove.addEventListener("click", () => this.recompose(this.accelerators.filter((other) => other !== accelerator)));
    return h(
      "section",
      { class: "part" },
      h("h3", {}, mode, known?.paper ? h("a", { href: known.paper, rel: "noreferrer" }, "paper") : null, remove),
      h("p", { class: "about" }, known ? known.title : `This model does not take ${mode}.`),
      made,
    );
  }

  /** A menu of what can be added to this lane. */
  composer() {
    const model = this.context.model();
    const free = this.context
      .accelerators()
      .filter(({ mode, schema }) => mode !== "none" && usable(schema, model) && !this.accelerators.some((a) => a.mode === mode));
    const label = this.isReference ? "Accelerate with…" : "Compose with…";
    const menu = h("select", { "aria-label": label }, h("option", { value: "" }, label));
    menu.append(...free.map(({ mode }) => h("option", { value: mode }, mode)));
    menu.addEventListener("change", () => {
      const added = { mode: menu.value, ...startingValues(this.schemaOf(menu.value), model) };
      this.recompose([...this.accelerators.filter(({ mode }) => mode !== "none"), added]);
    });
    return menu;
  }

  recompose(accelerators) {
    this.accelerators = accelerators;
    this.refresh();
    this.context.onchange();
  }

  // What happens to it, in order.

  start() {
    this.result = null;
    this.clearErrors();
    this.element.classList.remove("stale");
    this.element.dataset.phase = "waiting";
    this.facts.replaceChildren();
    this.bar.value = 0;
    this.save.hidden = true;
    for (const layer of [this.picture, this.difference, this.underlay]) layer.hidden = true;
    this.say("");
    this.stepText.textContent = "waiting";
  }

  queued({ position }) {
    this.stepText.textContent = position ? `queued, ${position} ahead` : "queued";
  }

  progress({ step, total_steps: total }) {
    this.element.dataset.phase = "running";
    this.bar.max = total;
    this.bar.value = step;
    this.stepText.textContent = `step ${step} of ${total}`;
  }

  preview({ b64_json: picture, output_format: format }) {
    this.picture.src = dataUrl(picture, format);
    this.picture.hidden = false;
  }

  async complete(body, signature) {
    this.preview({ ...body.images[0], output_format: body.output_format });
    this.picture.classList.toggle("pixels", body.width <= 128);
    this.underlay.classList.toggle("pixels", body.width <= 128);
    this.bar.value = this.bar.max;
    this.save.href = this.picture.src;
    this.save.download = `${this.name.replaceAll(/\W+/g, "-")}-${body.images[0].seed}.${body.output_format}`;
    this.save.hidden = false;
    this.element.dataset.phase = "done";
    this.stepText.textContent = `seed ${body.images[0].seed} · ${body.usage.steps} steps`;
    this.result = { body, signature, alone: null, pixels: await pixelsOf(this.picture.src) };
  }

  /** The same request ran by itself: its time, and whether company changed the picture. */
  async timed(body) {
    const pixels = await pixelsOf(dataUrl(body.images[0].b64_json, body.output_format));
    this.result.alone = { timing: body.timing, psnr: psnr(this.result.pixels, pixels) };
  }

  fail(message) {
    this.element.dataset.phase = "failed";
    this.stepText.textContent = "failed";
    this.picture.hidden = true;
    this.say(message);
  }

  /** It was not run, for a reason that stands elsewhere on the page. */
  skip() {
    this.element.dataset.phase = "idle";
    this.stepText.textContent = "not run";
  }

  cancelled() {
    this.element.dataset.phase = "cancelled";
    this.stepText.textContent = this.bar.value ? `cancelled at step ${this.bar.value}` : "cancelled";
  }

  say(message) {
    this.message.textContent = message;
  }

  /** Put an error beside the control it names; false where this lane has no such control. */
  showFieldError(param, message) {
    const path = param.replaceAll(/\[(\d+)\]/g, ".$1").split(".");
    if (path[0] !== "acceleration") return false;
    const at = path.find((segment) => /^\d+$/.test(segment));
    const named = this.controls.filter((c) => path.at(-1) === c.name && (at === undefined || c.at === Number(at)));
    const place = named.find((c) => path.includes(c.mode)) ?? named[0];
    if (place) {
      place.error.textContent = message;
      place.input.setAttribute("aria-invalid", "true");
    } else {
      this.error.textContent = message;
    }
    this.details.open = true;
    return true;
  }

  clearErrors() {
    this.error.textContent = "";
    for (const { input, error } of this.controls) {
      error.textContent = "";
      input.removeAttribute("aria-invalid");
    }
  }

  /** The numbers, beside those of the lane without acceleration where there is one. */
  showFacts(reference) {
    if (!this.result) return;
    const { body, alone } = this.result;
    const own = timeOf(this.result);
    const isReference = reference === this;
    const base = reference?.result && !isReference ? reference.result : null;
    const { macs, macs_unaccelerated: full } = body.usage;
    const ratio = base ? timeOf(base) / own : isReference ? 1 : null;
    const rows = [
      fact(alone ? "Time alone" : "Time", seconds(own), "figure"),
      ratio === null ? null : fact("Speed-up", `${measured(ratio)}×`, "figure speed-up"),
      ...(macs === null ? [] : [
        isReference ? fact("MACs", quantity(macs)) : fact("MACs saved", [percent(1 - macs / full), h("small", {}, `of ${quantity(full)}`)]),
        meter(macs / full),
      ]),
      ...(body.profile ? promised(body.profile) : []),
      reference ? fact("PSNR", base ? decibels(psnr(base.pixels, this.result.pixels)) : "–") : null,
      alone ? fact("Together", [seconds(body.timing.total_seconds), h("small", {}, sameness(alone.psnr))]) : null,
    ];
    this.facts.replaceChildren(...rows.filter(Boolean));
  }

  /** Show the picture, its difference, or both split. */
  async show(how, reference) {
    if (!this.result) return;
    const other = reference === this ? null : reference?.result;
    const split = how === "split" && other;
    const difference = how === "difference" && other;
    this.underlay.hidden = !split;
    this.difference.hidden = !difference;
    this.stage.classList.toggle("is-split", Boolean(split));
    this.say("");
    if (split) this.underlay.src = reference.picture.src;
    if (!difference) return;
    const ratio = psnr(other.pixels, this.result.pixels);
    if (ratio === null) this.say("Another size than the reference");
    else drawDifference(this.difference, other.pixels, this.result.pixels);
    if (ratio === Infinity) this.say("Identical");
    this.difference.setAttribute("aria-label", `Difference from the reference: PSNR ${decibels(ratio)}`);
  }

  /** Say so when the settings are no longer those of the picture. */
  compareSignature(signature) {
    const stale = this.result !== null && this.result.signature !== signature;
    this.element.classList.toggle("stale", stale);
    if (this.result) {
      const { body } = this.result;
      this.stepText.textContent = stale ? "settings changed since" : `seed ${body.images[0].seed} · ${body.usage.steps} steps`;
    }
  }
}

function timeOf({ body, alone }) {
  return (alone ?? body).timing.total_seconds;
}

function fact(name, value, className = null) {
  return h("div", { class: className }, h("dt", {}, name), h("dd", {}, value));
}

/** What auto chose, and what was measured of it. */
function promised({ candidate, promised: { psnr, speedup }, differences, moved }) {
  const chosen = h("span", { title: differences.join("; ") }, candidate);
  const notes = [moved ? "for the deadline" : null, differences.length ? "measured for another run" : null].filter(Boolean);
  return [
    fact("Chosen", notes.length ? [chosen, h("small", {}, notes.join(", "))] : chosen),
    fact("Promised", [decibels(psnr), h("small", {}, `${measured(speedup)}× fewer MACs`)]),
  ];
}

/** How much of the full work was done, as a bar. */
function meter(fraction) {
  const done = h("span");
  done.style.width = `${Math.min(100, 100 * fraction)}%`;
  return h("div", { class: "meter", "aria-hidden": "true" }, done);
}

function decibels(ratio) {
  if (ratio === null) return "–";
  return ratio === Infinity ? "identical" : `${ratio.toFixed(1)} dB`;
}

/** Batched with others or alone, a request gives the same image, up to the last bit of a floating-point sum. */
function sameness(ratio) {
  if (ratio === Infinity) return "same image";
  return ratio > 55 ? "same but rounding" : `${decibels(ratio)} from alone`;
}
