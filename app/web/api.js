/** Talking to the server: the key, errors in words, and the event stream. */

const KEY = "slipstream.key";
const BROKEN_OFF = "The connection broke off before the image was done.";

/** What the server refused, and the field at fault where it named one. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(param ? message.replace(`${param}: `, "") : message); // the page shows it beside that field
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export async function getJson(path) {
  return (await request(path)).json();
}

export async function getText(path) {
  return (await request(path)).text();
}

export async function getBlob(path) {
  return (await request(path)).blob();
}

export async function remove(path) {
  await request(path, { method: "DELETE" });
}

/** Post a generation; yields `{event, data}` as the server sends them. Aborting the signal frees the job's rows. */
export async function* generate(body, signal) {
  const response = await request("generate", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    signal,
  });
  for await (const { event, data } of serverSentEvents(response.body)) {
    if (event === "error") throw new ApiError(response.status, data.error);
    yield { event, data };
    if (event === "completed") return;
  }
  throw new ApiError(0, { message: BROKEN_OFF });
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = inBytes(`Bearer ${apiKey()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server does not answer." });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

// Headers hold bytes: a key beyond ASCII goes as UTF-8.
function inBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error);
  } catch {
    return new ApiError(response.status, { message: `The server answered ${response.status}.` });
  }
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(brokenOff);
      if (done) return;
      // A CR at the end of a chunk may be half of a CRLF: it waits for the next one.
      buffer = (buffer + value).replaceAll("\r\n", "\n");
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      yield* blocks.map(parseEvent).filter((event) => event.data !== undefined);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function brokenOff(error) {
  throw error.name === "AbortError" ? error : new ApiError(0, { message: BROKEN_OFF });
}

function parseEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const [, field, value] = line.match(/^(\w*):? ?(.*)$/);
    if (field === "event") event = value;
    if (field === "data") data.push(value);
  }
  return { event, data: data.length ? JSON.parse(data.join("\n")) : undefined };
}
