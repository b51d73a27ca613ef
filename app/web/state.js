/** What the page is set to, and its form in the URL: `#model=…&prompt=…&acceleration=deepcache:interval=3+…`. */

const TEXTS = ["model", "prompt", "negative_prompt", "scheduler"];
const NUMBERS = ["width", "height", "num_inference_steps", "guidance_scale", "seed", "class_label", "strength", "image_guidance_scale", "timestep_warp"];

/** The fields of a request that the form holds; null means the model's default. `lanes` are lists of accelerations. */
export function emptyState() {
  const fields = Object.fromEntries([...TEXTS, ...NUMBERS].map((name) => [name, null]));
  return { ...fields, lanes: [], view: "compare", show: "picture", image: null, imageName: null };
}

/** The state in a location's hash; nothing where it says nothing. */
export function readHash(hash) {
  const state = emptyState();
  for (const pair of hash.replace(/^#/, "").split("&").filter((text) => text.includes("="))) {
    const at = pair.indexOf("=");
    const [name, value] = [pair.slice(0, at), decode(pair.slice(at + 1))];
    if (name === "acceleration") state.lanes.push(readLane(value));
    else if (NUMBERS.includes(name) && value !== "" && Number.isFinite(Number(value))) state[name] = Number(value);
    else if (TEXTS.includes(name) || ["view", "show", "imageName"].includes(name)) state[name] = value;
  }
  return state;
}

export function writeHash(state) {
  const pairs = [...TEXTS, ...NUMBERS].filter((name) => state[name] !== null).map((name) => [name, state[name]]);
  if (state.imageName) pairs.push(["imageName", state.imageName]);
  pairs.push(...state.lanes.map((lane) => ["acceleration", writeLane(lane)]));
  if (state.view !== "compare") pairs.push(["view", state.view]);
  if (state.show !== "picture") pairs.push(["show", state.show]);
  return `#${pairs.map(([name, value]) => `${name}=${encode(String(value))}`).join("&")}`;
}

/** A lane in the command line's grammar, `mode:key=value,key=value`, composed with `+`. */
export function writeLane(lane) {
  return lane.length === 0 ? "none" : lane.map(writeAccelerator).join("+");
}

function writeAccelerator({ mode, ...values }) {
  const pairs = Object.entries(values).map(([name, value]) => `${name}=${encodeURIComponent(literal(value))}`);
  return pairs.length ? `${mode}:${pairs.join(",")}` : mode;
}

function readLane(text) {
  return text === "none" ? [] : text.split("+").map(readAccelerator);
}

function readAccelerator(text) {
  const [mode, ...rest] = text.split(":");
  const accelerator = { mode };
  for (const pair of rest.join(":").split(",").filter(Boolean)) {
    const [name, ...value] = pair.split("=");
    accelerator[name] = parse(decode(value.join("=")));
  }
  return accelerator;
}

const literal = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** A number, boolean, null or list where it reads as one, else the text itself. */
function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Percent-encoding that leaves what a hash may hold readable. */
function encode(text) {
  return encodeURIComponent(text).replace(/%(3A|2C|3D|2B|2F)/g, decodeURIComponent);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // cut in the middle of an escape by whoever pasted it
  }
}
