/** The page: asks the server what it can do, and ties form, lanes and views together. */

import { ApiError, apiKey, getJson, setApiKey } from "./api.js";
import { fromServer } from "./catalog.js";
import { compare } from "./compare.js";
import { byId, h, seconds } from "./dom.js";
import { RequestForm } from "./form.js";
import { Lane } from "./lane.js";
import { HistoryView, keep } from "./history.js";
import { LoadView } from "./load.js";
import { startingValues, usable } from "./schema.js";
import { snippets } from "./snippets.js";
import { emptyState, readHash, writeHash, writeLane } from "./state.js";
import { startTheme } from "./theme.js";

const MOST_LANES = 5; // a browser opens six connections to a server; one stays free for the metrics
const VIEWS = ["compare", "load", "history"];
const PICTURE = "slipstream.picture";
const DEFAULT_SEED = 7;

const state = emptyState();
const form = new RequestForm(state, { onchange: changed, onmodel: modelChosen });
const load = new LoadView(byId("panels"));
const past = new HistoryView(byId("pictures"), {
  onrestore: restore,
  onerror: (error) => notify(error.message),
  hasJobs: () => catalog.jobs,
});
let catalog = null;
let lanes = [];
let running = null; // the AbortController of the comparison under way
let snippetLane = null;

const laneContext = {
  model: () => form.model,
  accelerators: () => form.model.accelerators,
  onchange: changed,
  onremove: removeLane,
  oncopy: openSnippets,
};

start();

async function start() {
  startTheme(byId("theme"));
  wire();
  await connect();
}

/** Ask the server for its models; ask the person for a key where the server wants one. */
async function connect() {
  try {
    catalog = fromServer(await getJson("v1/models"));
  } catch (error) {
    byId("health").dataset.state = "down";
    byId("health").textContent = error.status === 401 ? "locked" : error.status === 503 ? "loading" : "not answering";
    if (error.status === 401) return askForKey(error);
    if (!(error instanceof ApiError)) throw error;
    notify(error.status === 503 ? "The models are loading." : error.message);
    setTimeout(connect, 2000);
    return;
  }
  notify("");
  byId("main").classList.remove("unconnected");
  byId("health").dataset.state = "up";
  byId("health").textContent = "ready";
  byId("key-form").hidden = true;
  byId("key-open").hidden = !apiKey();
  applyHash();
}

function askForKey(error) {
  byId("key-form").hidden = false;
  byId("api-key-error").textContent = apiKey() ? "The server does not accept this key." : "";
  byId("api-key").setAttribute("aria-invalid", String(Boolean(apiKey())));
  byId("api-key").focus();
}

function wire() {
  byId("request").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("cancel").addEventListener("click", () => running?.abort());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setApiKey(byId("api-key").value.trim());
    connect();
  });
  byId("key-open").addEventListener("click", () => {
    byId("key-form").hidden = !byId("key-form").hidden;
    byId("api-key").focus();
  });
  byId("view-compare").addEventListener("click", () => showView("compare"));
  byId("view-load").addEventListener("click", () => showView("load"));
  byId("view-history").addEventListener("click", () => showView("history"));
  byId("show").addEventListener("change", ({ target }) => {
    state.show = target.value;
    changed();
    showPictures();
  });
  byId("split-at").addEventListener("input", ({ target }) => splitAt(target.value));
  byId("lanes").addEventListener("pointermove", dragSplit);
  byId("lanes").addEventListener("pointerdown", dragSplit);
  byId("snippets-close").addEventListener("click", () => byId("snippets").close());
  byId("snippets").addEventListener("change", showSnippet);
  byId("snippet-copy").addEventListener("click", copySnippet);
  window.addEventListener("hashchange", () => location.hash !== writeHash(state) && applyHash());
  document.addEventListener("keydown", shortcut);
  wireDrop();
}

function shortcut(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && running && !byId("snippets").open) {
    running.abort();
  }
}

/** Pictures dropped or pasted anywhere start the image. */
function wireDrop() {
  const carriesFile = (transfer) => transfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carriesFile(event.dataTransfer)) return;
    event.preventDefault();
    byId("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    byId("drop").hidden = true;
    if (!carriesFile(event.dataTransfer)) return;
    event.preventDefault();
    form.usePicture(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const picture = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (picture) form.usePicture(picture);
  });
}

// The state, its link, and what the page shows of it.

function applyHash() {
  Object.assign(state, readHash(location.hash));
  state.image = state.imageName ? sessionStorage.getItem(PICTURE) : null;
  const model = currentModel();
  state.seed ??= DEFAULT_SEED;
  state.prompt ??= model.examples[0] ?? "";
  form.show(catalog.models, model);
  if (state.lanes.length === 0) state.lanes = suggestedLanes(model);
  lanes = state.lanes.slice(0, MOST_LANES).map((accelerators) => new Lane(accelerators, laneContext));
  byId("show").querySelector(`[value="${CSS.escape(state.show)}"]`)?.click();
  showLanes();
  showView(state.view);
}

/** Set the page to a past request, in a lane of its own. */
function restore(request) {
  const lane = [request.acceleration ?? []].flat();
  const known = Object.keys(emptyState()).filter((name) => name in request && name !== "image");
  location.hash = writeHash({ ...emptyState(), ...Object.fromEntries(known.map((name) => [name, request[name]])), lanes: [lane] });
}

function currentModel() {
  return catalog.models.find(({ id }) => id === state.model) ?? catalog.first;
}

function modelChosen() {
  const { prompt } = state;
  const previous = form.model;
  for (const name of ["width", "height", "num_inference_steps", "guidance_scale", "scheduler"]) state[name] = null;
  const model = currentModel();
  if (previous.examples.includes(prompt) && !model.examples.includes(prompt)) state.prompt = model.examples[0] ?? "";
  form.show(catalog.models, model);
  const known = new Set(laneContext.accelerators().map(({ mode }) => mode));
  const wanted = lanes.map((lane) => lane.accelerators).filter((lane) => lane.every(({ mode }) => known.has(mode)));
  const names = new Set(wanted.map(writeLane));
  const fresh = suggestedLanes(model).filter((lane) => !names.has(writeLane(lane)));
  wanted.push(...fresh.slice(0, lanes.length - wanted.length));
  lanes = wanted.map((accelerators) => new Lane(accelerators, laneContext));
  showLanes();
}

/** A comparison to begin with: the full run, and the first two accelerators that need no further choice. */
function suggestedLanes(model) {
  const ready = model.accelerators.filter(
    ({ mode, schema }) => mode !== "none" && !needsNumber(schema, model) && usable(schema, model),
  );
  return [[], ...ready.slice(0, 2).map(({ mode, schema }) => [{ mode, ...startingValues(schema, model) }])];
}

function needsNumber(schema, model) {
  return Object.values(startingValues(schema, model)).some((value) => typeof value === "number");
}

function changed() {
  state.lanes = lanes.map((lane) => lane.accelerators);
  history.replaceState(null, "", writeHash(state));
  rememberPicture();
  for (const lane of lanes) lane.compareSignature(signatureOf(lane));
  byId("run-label").textContent = lanes.length > 1 ? `Compare ${lanes.length}` : "Generate";
}

function rememberPicture() {
  try {
    if (state.image) sessionStorage.setItem(PICTURE, state.image);
    else sessionStorage.removeItem(PICTURE);
  } catch {
    sessionStorage.removeItem(PICTURE); // too large to remember over a reload; the page then asks for it again
  }
}

function showView(view) {
  state.view = VIEWS.includes(view) ? view : "compare";
  if (state.view === "history") past.show();
  for (const name of VIEWS) {
    byId(name).hidden = name !== state.view;
    byId(`view-${name}`).setAttribute("aria-pressed", String(name === state.view));
  }
  if (state.view === "load") load.follow("view");
  else load.unfollow("view");
  if (catalog) changed();
}

// Lanes.

function showLanes() {
  byId("lanes").replaceChildren(...lanes.map((lane) => lane.element), ...(lanes.length < MOST_LANES ? [adder()] : []));
  byId("lanes").dataset.count = lanes.length;
  for (const lane of lanes) lane.element.classList.toggle("only", lanes.length === 1);
  showFacts();
  changed();
}

/** What can be added as another lane, each with its sentence. */
function adder() {
  const model = form.model;
  const offers = model.accelerators.filter(({ schema, mode }) => mode !== "none" && usable(schema, model));
  const buttons = offers.map(({ mode, title, schema }) => offer(mode, title, [{ mode, ...startingValues(schema, model) }]));
  if (!lanes.some((lane) => lane.isReference)) buttons.unshift(offer("no acceleration", "The reference.", []));
  return h("section", { class: "adder", "aria-label": "Add a lane" }, h("h2", {}, "Add a lane"), h("ul", {}, buttons));
}

function offer(name, sentence, accelerators) {
  const button = h("button", { type: "button", title: sentence }, h("strong", {}, name), h("span", {}, sentence));
  button.addEventListener("click", () => {
    const lane = new Lane(accelerators, laneContext);
    lanes = accelerators.length ? [...lanes, lane] : [lane, ...lanes];
    showLanes();
    lane.details.open = accelerators.length > 0;
    lane.details.querySelector("summary").focus();
  });
  return h("li", {}, button);
}

function removeLane(lane) {
  if (running || lanes.length === 1) return;
  lanes = lanes.filter((other) => other !== lane);
  showLanes();
  showPictures();
}

function referenceLane() {
  return lanes.find((lane) => lane.isReference && lane.result) ?? null;
}

function showFacts() {
  const reference = referenceLane();
  for (const lane of lanes) lane.showFacts(reference);
  byId("show").disabled = !reference || lanes.filter((lane) => lane.result).length < 2;
}

function showPictures() {
  byId("split").hidden = state.show !== "split" || byId("show").disabled;
  const reference = referenceLane();
  for (const lane of lanes) lane.show(byId("show").disabled ? "picture" : state.show, reference);
}

function splitAt(value) {
  byId("lanes").style.setProperty("--split", `${value}%`);
  byId("split-at").value = value;
}

function dragSplit(event) {
  const stage = event.target.closest(".stage.is-split");
  if (!stage || (event.pointerType !== "mouse" && event.type === "pointermove" && event.buttons === 0)) return;
  const { left, width } = stage.getBoundingClientRect();
  splitAt(Math.round(Math.max(0, Math.min(1, (event.clientX - left) / width)) * 100));
}

// Running.

function bodyOf(lane) {
  const body = form.body();
  return lane.acceleration ? { ...body, acceleration: lane.acceleration } : body;
}

function signatureOf(lane) {
  return JSON.stringify(bodyOf(lane));
}

async function run() {
  if (running || !catalog) return;
  running = new AbortController();
  form.clearErrors();
  setRunning(true);
  load.follow("run");
  try {
    const finished = await compare({
      lanes,
      bodyOf,
      signatureOf,
      signal: running.signal,
      timeAlone: byId("alone").checked,
      onerror: placeError,
      onphase: say,
    });
    for (const lane of finished) keep(bodyOf(lane), lane.result.body).catch(() => {}); // nothing is kept in private
    say(running.signal.aborted ? "Cancelled" : summaryOf(finished));
  } catch (error) {
    say("");
    if (error.status === 401) askForKey(error);
    else notify(error.message);
  } finally {
    running = null;
    load.unfollow("run");
    setRunning(false);
    showFacts();
    showPictures();
  }
}

function setRunning(yes) {
  byId("cancel").hidden = !yes;
  byId("run").hidden = yes;
  byId("lanes").classList.toggle("running", yes);
  byId("lanes").setAttribute("aria-busy", String(yes));
  notify("");
  if (yes && byId("lanes").getBoundingClientRect().top > innerHeight * 0.8) byId("summary").scrollIntoView();
  (yes ? byId("cancel") : byId("run")).focus({ preventScroll: true });
}

function placeError(lane, error) {
  const { param, message } = error;
  if (param && lane.showFieldError(param, message)) lane.fail(`${param.split(".").at(-1)}: ${message}`);
  else if (param && form.showError(param, message)) lane.skip();
  else lane.fail(message);
}

function summaryOf(finished) {
  if (finished.length === 0) return "";
  const together = Math.max(...finished.map(({ result }) => result.body.timing.total_seconds));
  if (finished.length === 1) return `One image in ${seconds(together)}`;
  return `${finished.length} images together in ${seconds(together)}, previews included`;
}

function say(text) {
  byId("summary").textContent = text;
}

function notify(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

// Copying a request.

function openSnippets(lane) {
  snippetLane = lane;
  showSnippet();
  byId("snippets").showModal();
}

function showSnippet() {
  const kind = byId("snippets").querySelector("[name=snippet]:checked").value;
  byId("snippet").textContent = snippets[kind](bodyOf(snippetLane));
  byId("snippet-copy").textContent = "Copy";
}

async function copySnippet() {
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    byId("snippet-copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("snippet")); // no clipboard outside a secure context: select it instead
    byId("snippet-copy").textContent = "Selected: copy with Ctrl C";
  }
}
