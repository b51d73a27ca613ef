/** A request as somebody else would send it: curl, Python (`openai`), JSON. */

import { apiKey } from "./api.js";

const PICTURE = "input.png"; // stands in for a dropped picture, which is too long to read

export const snippets = { curl, python, json };

const base = () => new URL(".", location.href.split("#")[0]).href.replace(/\/$/, "");

function json(body) {
  return JSON.stringify(shortened(body), null, 2);
}

function curl(body) {
  const lines = [`curl -sS ${base()}/generate \\`, "  -H 'Content-Type: application/json' \\"];
  if (apiKey()) lines.push('  -H "Authorization: Bearer $SLIPSTREAM_API_KEY" \\');
  lines.push("  -H 'Accept: image/png' -o image.png \\");
  if (!body.image) return [...lines, `  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`].join("\n");
  const text = JSON.stringify({ ...body, image: "@" }).replace('"@"', `"$(base64 < ${PICTURE} | tr -d '\\n')"`);
  return [...lines, "  -d @- <<EOF", text, "EOF"].join("\n");
}

function python(body) {
  const { model, prompt, width, height, ...extra } = body;
  const size = width && height ? [`    size="${width}x${height}",`] : [];
  const key = apiKey() ? 'os.environ["SLIPSTREAM_API_KEY"]' : '"unused"';
  return [
    "import base64",
    ...(apiKey() ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${base()}/v1", api_key=${key})`,
    "answer = client.images.generate(",
    `    model=${JSON.stringify(model)},`,
    `    prompt=${JSON.stringify(prompt)},`,
    ...size,
    '    response_format="b64_json",',
    "    extra_body={",
    ...Object.entries(extra).map(([name, value]) => `        "${name}": ${argument(name, value)},`),
    "    },",
    ")",
    'with open("image.png", "wb") as file:',
    "    file.write(base64.b64decode(answer.data[0].b64_json))",
  ].join("\n");
}

function argument(name, value) {
  return name === "image" ? `base64.b64encode(open("${PICTURE}", "rb").read()).decode()` : literal(value);
}

/** A JSON value as Python writes it. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, item]) => `"${name}": ${literal(item)}`).join(", ")}}`;
}

function shortened(body) {
  return body.image ? { ...body, image: `<base64 of ${PICTURE}>` } : body;
}
