/** Past pictures with their settings: this browser's own, and the jobs of the server's store where it has one. */

import { generate, getBlob, getJson, remove } from "./api.js";
import { h, measured } from "./dom.js";
import { dataUrl, pixelsOf, psnr } from "./picture.js";

const DATABASE = "slipstream";
const STORE = "pictures";
const KEPT = 60; // of this browser's; the oldest are forgotten

export class HistoryView {
  /** `onrestore(request)` sets the page to a body of /generate. */
  constructor(element, { onrestore, onerror, hasJobs }) {
    this.element = element;
    this.onrestore = onrestore;
    this.onerror = onerror;
    this.hasJobs = hasJobs;
    this.urls = [];
  }

  /** Show what there is, the latest first. */
  async show() {
    const own = await kept().catch(() => []); // a browser that keeps nothing, say in private
    const jobs = this.hasJobs() ? await this.jobs().catch((error) => this.onerror(error) ?? []) : [];
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    const cards = [...own, ...jobs].sort((a, b) => b.created - a.created).map((past) => this.card(past));
    const nothing = h("p", { class: "message" }, "No pictures yet: what is generated here, or as a job, comes here.");
    this.element.replaceChildren(...(cards.length ? cards : [nothing]));
  }

  /** Finished jobs of the store. */
  async jobs() {
    const { data } = await getJson("v1/images/jobs?status=completed&limit=40");
    return data.flatMap((job) =>
      job.images.map((image) => ({
        created: job.completed_at * 1000,
        request: { ...job.request, seed: image.seed },
        uploads: job.has_image,
        picture: () => getBlob(image.url.slice(1)),
        forget: () => remove(`v1/images/jobs/${job.id}`),
        from: "job",
      })),
    );
  }

  card(past) {
    const { prompt, model, seed, acceleration } = past.request;
    const modes = [acceleration ?? []].flat().map(({ mode }) => mode);
    const picture = h("img", { alt: `Past picture: ${prompt}` });
    const pictures = h("div", { class: "pair" }, picture);
    const said = h("span", { role: "status" });
    past.picture().then(
      (blob) => this.urls.push((picture.src = URL.createObjectURL(blob))),
      (error) => this.onerror(error),
    );
    const restore = h("button", { type: "button", title: "Set the page to this request" }, "Restore");
    restore.addEventListener("click", () => this.onrestore(past.request));
    const compare = h("button", { type: "button", class: "quiet", title: "Draw it again and measure" }, "Compare with now");
    compare.disabled = past.uploads; // the picture that it began with is not kept here
    compare.addEventListener("click", async () => {
      compare.disabled = true;
      said.textContent = "drawing …";
      try {
        const now = await drawn(past.request);
        said.textContent = `now: ${likeness(await pixelsOf(picture.src), await pixelsOf(now))}`;
        pictures.replaceChildren(picture, h("img", { alt: `The same request now: ${prompt}`, src: now }));
      } catch (error) {
        said.textContent = "";
        this.onerror(error);
      }
      compare.disabled = false;
    });
    const forget = h("button", { type: "button", class: "quiet" }, "Delete");
    forget.addEventListener("click", async () => {
      await past.forget();
      await this.show();
    });
    return h(
      "article",
      { class: "past", "aria-label": prompt },
      pictures,
      h("p", {}, prompt),
      h("p", { class: "values" }, `${model} · seed ${seed} · ${modes.join(" + ") || "no acceleration"} · ${past.from} `, said),
      h("footer", {}, restore, compare, forget),
    );
  }
}

/** The picture of a request as it is drawn now, as a URL. */
async function drawn(request) {
  for await (const { event, data } of generate(request)) {
    if (event === "completed") return dataUrl(data.images[0].b64_json, data.output_format);
  }
}

/** How like two pictures are, in words. */
function likeness(then, now) {
  const decibels = psnr(then, now);
  return decibels === null ? "another size" : decibels === Infinity ? "the same" : `${measured(decibels)} dB`;
}

/** Keep a finished picture in this browser. */
export async function keep(request, body) {
  const [image] = body.images;
  const bytes = Uint8Array.from(atob(image.b64_json), (letter) => letter.charCodeAt(0));
  const past = {
    created: Date.now(),
    request: { ...request, model: body.model, seed: image.seed, image: undefined },
    uploads: Boolean(request.image),
    blob: new Blob([bytes], { type: `image/${body.output_format}` }),
  };
  await transaction("readwrite", (store) => store.add(past));
  const keys = await transaction("readonly", (store) => store.getAllKeys());
  for (const key of keys.slice(0, -KEPT)) await transaction("readwrite", (store) => store.delete(key));
}

async function kept() {
  const [keys, values] = [
    await transaction("readonly", (store) => store.getAllKeys()),
    await transaction("readonly", (store) => store.getAll()),
  ];
  return values.map((value, at) => ({
    created: value.created,
    request: value.request,
    uploads: value.uploads ?? false,
    picture: async () => value.blob,
    forget: () => transaction("readwrite", (store) => store.delete(keys[at])),
    from: "this browser",
  }));
}

/** Do one thing with the browser's store. */
async function transaction(mode, work) {
  const database = await settled(open());
  try {
    return await settled(work(database.transaction(STORE, mode).objectStore(STORE)));
  } finally {
    database.close();
  }
}

function open() {
  const opening = indexedDB.open(DATABASE, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { autoIncrement: true });
  return opening;
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
