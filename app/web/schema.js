/** Controls made from an accelerator's JSON Schema, so that a new accelerator needs no change here. */

import { h } from "./dom.js";

/** The parameters of a schema as plain facts; `model` gives the names that a string may take (adapters, plans). */
export function parameters(schema, model) {
  const required = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {})
    .filter(([name, property]) => name !== "mode" && property.const === undefined)
    .map(([name, property]) => parameter(name, property, required.has(name), model));
}

/** The values to start with: what is required and has no default of its own. */
export function startingValues(schema, model) {
  const needed = parameters(schema, model).filter((p) => p.required);
  return Object.fromEntries(needed.map((p) => [p.name, p.choices[0] ?? p.minimum ?? (p.kind === "text" ? "" : 1)]));
}

/** Whether the model offers what a schema cannot do without: a registered plan, say. */
export function usable(schema, model) {
  return parameters(schema, model).every((p) => p.choices.length > 0 || !p.registered);
}

/** One labelled control. `onchange(value)` gets undefined where the default applies. */
export function control(parameter, value, onchange) {
  const id = `p${(control.count = (control.count ?? 0) + 1)}`;
  const input = inputFor(parameter, value ?? parameter.default ?? null, id);
  input.addEventListener(input.type === "checkbox" ? "change" : "input", () => {
    const next = read(parameter, input);
    onchange(!parameter.required && next === (parameter.default ?? null) ? undefined : next);
  });
  const label = h("label", { for: id }, parameter.name.replaceAll("_", " "));
  const tip = h("p", { class: "tip", id: `${id}-tip` }, parameter.description);
  const error = h("p", { class: "error", id: `${id}-error`, role: "alert" });
  return { input, error, element: h("div", { class: `field ${parameter.kind}` }, label, tip, input, error) };
}

function parameter(name, property, required, model) {
  const branches = property.anyOf ?? [property];
  const type = branches.find((b) => b.type && b.type !== "null" && b.type !== "object") ?? property;
  const registry = type.type === "string" && !type.enum ? names(model?.[`${name}s`]) : null;
  const integer = type.type === "integer";
  return {
    name,
    required,
    optional: branches.some((b) => b.type === "null"),
    default: property.default,
    description: property.description ?? "",
    kind: { integer: "number", number: "number", boolean: "boolean", string: "text" }[type.type] ?? "json",
    registered: registry !== null,
    choices: type.enum ?? registry ?? [],
    minimum: type.minimum ?? type.exclusiveMinimum,
    maximum: type.maximum ?? type.exclusiveMaximum,
    step: integer ? 1 : "any",
  };
}

function names(registered) {
  if (Array.isArray(registered)) return registered.map((entry) => entry.name ?? entry.id ?? entry);
  return registered ? Object.keys(registered) : null;
}

function inputFor(parameter, value, id) {
  const shared = { id, "aria-describedby": `${id}-error ${id}-tip` };
  if (parameter.choices.length || parameter.registered) {
    const options = parameter.choices.map((choice) => h("option", { value: choice }, choice));
    if (parameter.optional) options.unshift(h("option", { value: "" }, "default"));
    const select = h("select", shared, options);
    select.value = value ?? "";
    return select;
  }
  if (parameter.kind === "boolean") {
    const box = h("input", { ...shared, type: "checkbox" });
    box.checked = Boolean(value);
    return box;
  }
  const { kind, minimum, maximum, step, optional } = parameter;
  const bounds = kind === "number" ? { type: "number", min: minimum, max: maximum, step } : { type: "text" };
  const input = h("input", { ...shared, ...bounds, placeholder: optional ? "default" : null });
  input.value = kind === "json" && value !== null ? JSON.stringify(value) : (value ?? "");
  return input;
}

function read(parameter, input) {
  if (parameter.kind === "boolean") return input.checked;
  const text = input.value.trim();
  if (text === "") return parameter.optional ? null : (parameter.default ?? null);
  if (parameter.kind === "number") return Number(text);
  return parameter.kind === "json" ? parseJson(text) : text;
}

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text; // the server says what is wrong with it
  }
}
