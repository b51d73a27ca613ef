/** Prometheus text, and what can be read off two scrapes of it. */

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** One scrape: the samples of each name, `{labels, value}`. */
export function parseMetrics(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : line.match(SAMPLE);
    if (!match) continue;
    const [, name, labelText = "", value] = match;
    const labels = Object.fromEntries([...labelText.matchAll(LABEL)].map(([, key, raw]) => [key, raw.replace(/\\(.)/g, "$1")]));
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels, value: Number(value.replace("Inf", "Infinity")) });
  }
  return samples;
}

/** The sum of a name's samples whose labels match; null where there is none. */
export function total(scrape, name, where = {}) {
  const matching = select(scrape, name, where);
  return matching.length ? matching.reduce((sum, { value }) => sum + value, 0) : null;
}

/** What a counter gained between two scrapes. */
export function gained(before, after, name, where = {}) {
  return (total(after, name, where) ?? 0) - (total(before, name, where) ?? 0);
}

export function labelValues(scrape, name, label) {
  return [...new Set((scrape.get(name) ?? []).map(({ labels }) => labels[label]))].sort();
}

/** A histogram between two scrapes (or since the start): `{bounds, counts, count, sum}`, counts per bucket. */
export function histogram(before, after, name, where = {}) {
  const upTo = cumulative(after, name, where);
  const earlier = before ? cumulative(before, name, where) : new Map();
  const bounds = [...upTo.keys()].sort((a, b) => a - b);
  const running = bounds.map((bound) => upTo.get(bound) - (earlier.get(bound) ?? 0));
  const counts = running.map((value, at) => value - (running[at - 1] ?? 0));
  const sum = (total(after, `${name}_sum`, where) ?? 0) - (before ? (total(before, `${name}_sum`, where) ?? 0) : 0);
  return { bounds, counts, count: running.at(-1) ?? 0, sum };
}

/** The quantile within a histogram, linear inside a bucket; the last finite bound beyond them. */
export function quantile({ bounds, counts, count }, q) {
  let below = 0;
  for (const [at, inBucket] of counts.entries()) {
    if (inBucket > 0 && below + inBucket >= q * count) {
      const low = bounds[at - 1] ?? 0;
      return Number.isFinite(bounds[at]) ? low + ((bounds[at] - low) * (q * count - below)) / inBucket : low;
    }
    below += inBucket;
  }
  return null;
}

function cumulative(scrape, name, where) {
  const sums = new Map();
  for (const { labels, value } of select(scrape, `${name}_bucket`, where)) {
    const bound = Number(labels.le.replace("+Inf", "Infinity"));
    sums.set(bound, (sums.get(bound) ?? 0) + value);
  }
  return sums;
}

function select(scrape, name, where) {
  const wanted = Object.entries(where);
  return (scrape.get(name) ?? []).filter(({ labels }) => wanted.every(([key, value]) => labels[key] === value));
}
