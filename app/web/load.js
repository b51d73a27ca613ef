/** The load view: the server's own metrics, read every second and drawn. */

import { getText } from "./api.js";
import { areas, bars, strip } from "./chart.js";
import { counted, h, percent, quantity, seconds } from "./dom.js";
import { gained, histogram, labelValues, parseMetrics, quantile, total } from "./metrics.js";

const PERIOD = 1; // seconds between scrapes
const SPAN = 120; // seconds shown
const SMOOTH = 3; // scrapes over which a rate is taken

export class LoadView {
  constructor(container) {
    this.scrapes = []; // {at, samples}
    this.readers = new Set();
    this.timer = null;
    this.panels = {
      requests: panel("Requests", "two minutes"),
      work: panel("Steps a second", "two minutes"),
      rows: panel("Rows in a tick", "how often"),
      plans: panel("Plans in a tick", "how often"),
      latency: panel("Latency by acceleration", "since the server started", "wide"),
      memory: panel("Memory", "two minutes", "wide"),
    };
    this.note = h("p", { class: "notice", role: "status", hidden: true });
    container.append(this.note, ...Object.values(this.panels).map(({ element }) => element));
  }

  /** Read the metrics for as long as anybody (the view, a comparison under way) wants them. */
  follow(reader) {
    this.readers.add(reader);
    if (this.timer === null) this.tick();
  }

  unfollow(reader) {
    this.readers.delete(reader);
    if (this.readers.size > 0) return;
    clearTimeout(this.timer);
    this.timer = null;
  }

  async tick() {
    this.timer = setTimeout(() => this.tick(), PERIOD * 1000);
    try {
      const samples = parseMetrics(await getText("metrics"));
      const at = performance.now() / 1000;
      this.scrapes = [...this.scrapes.filter((scrape) => at - scrape.at < SPAN), { at, samples }];
      this.note.hidden = true;
    } catch (error) {
      this.note.textContent = error.status === 401 ? "The metrics ask for an API key." : error.message;
      this.note.hidden = false;
      return;
    }
    if (this.readers.has("view")) this.draw(this.scrapes.at(-1).samples);
  }

  draw(now) {
    this.drawRequests(now);
    this.drawWork(now);
    this.drawDistribution(this.panels.rows, "slipstream_tick_rows", now);
    this.drawDistribution(this.panels.plans, "slipstream_tick_plans", now);
    this.drawLatency(now);
    this.drawMemory(now);
  }

  drawRequests(now) {
    const running = this.series("slipstream_requests_running");
    const waiting = this.series("slipstream_requests_waiting");
    const capacity = total(now, "slipstream_queue_capacity");
    this.panels.requests.show(this.stacked(running, waiting, 4), [
      key("one", counted(running.at(-1)), "running"),
      key("two", counted(waiting.at(-1)), capacity ? `waiting of ${capacity}` : "waiting"),
    ]);
  }

  drawWork(now) {
    const full = this.rates("slipstream_denoise_steps_total", { kind: "full" });
    const reduced = this.rates("slipstream_denoise_steps_total", { kind: "reduced" });
    const saved = total(now, "slipstream_macs_total", { kind: "saved" }) ?? 0;
    const computed = total(now, "slipstream_macs_total", { kind: "computed" }) ?? 0;
    this.panels.work.show(this.stacked(reduced, full, 10), [
      key("one", Math.round(reduced.at(-1)), "reduced"),
      key("two", Math.round(full.at(-1)), "full"),
      saved ? key("", percent(saved / (saved + computed)), "of MACs saved") : "",
    ]);
  }

  drawDistribution(place, metric, now) {
    const recent = histogram(this.scrapes[0].samples, now, metric);
    const shown = recent.count ? recent : histogram(null, now, metric);
    const used = Math.max(4, shown.counts.findLastIndex((count) => count > 0) + 1);
    const labels = shown.bounds.map((bound, at) => bucketLabel(shown.bounds[at - 1], bound));
    const before = this.scrapes.at(-2)?.samples;
    const last = before ? histogram(before, now, metric) : { count: 0 };
    place.show(bars(shown.counts.slice(0, used), labels), [
      key("one", last.count ? counted(last.sum / last.count) : "–", "now"),
      key("", shown.count ? counted(shown.sum / shown.count) : "–", recent.count ? "mean of two minutes" : "mean since the start"),
    ]);
  }

  drawLatency(now) {
    const metric = "slipstream_request_duration_seconds";
    const modes = labelValues(now, `${metric}_bucket`, "acceleration");
    const found = modes.map((mode) => [mode, histogram(null, now, metric, { acceleration: mode, outcome: "ok" })]);
    const rows = found.filter(([, { count }]) => count > 0).map(([mode, times]) => latencyRow(mode, times));
    if (rows.length === 0) {
      this.panels.latency.show(h("p", { class: "empty" }, "No request has finished yet."), []);
      return;
    }
    const bounds = found[0][1].bounds.filter(Number.isFinite);
    const heads = ["acceleration", "requests", "median", "95 %"].map((text) => h("th", { scope: "col" }, text));
    const scale = h("th", { scope: "col", class: "scale" }, h("span", {}, seconds(bounds[0])), h("span", {}, seconds(bounds.at(-1))));
    this.panels.latency.show(h("table", {}, h("thead", {}, h("tr", {}, heads, scale)), h("tbody", {}, rows)), []);
  }

  drawMemory(now) {
    const lines = [
      ["Features kept between steps", "slipstream_feature_memory_bytes"],
      ["Weights", "slipstream_model_weight_bytes"],
      ["Process", "process_resident_memory_bytes"],
      ["GPU, this process", "slipstream_gpu_memory_allocated_bytes"],
      ["GPU, everybody", "slipstream_gpu_memory_used_bytes"],
    ].filter(([, name]) => total(now, name) !== null);
    const rows = lines.map(([label, name]) => {
      const values = this.series(name);
      const chart = this.chart([{ className: "one", values }], Math.max(1, ...values) * 1.15);
      return h("div", { class: "memory" }, h("span", {}, label), h("strong", {}, quantity(values.at(-1), "B")), chart);
    });
    this.panels.memory.show(h("div", {}, rows), []);
  }

  stacked(one, two, least) {
    const most = Math.max(least, ...one.map((value, at) => value + two[at]));
    const chart = this.chart([{ className: "one", values: one }, { className: "two", values: two }], most);
    return h("div", { class: "scaled" }, h("span", {}, Math.ceil(most)), chart);
  }

  chart(series, most) {
    return areas(this.scrapes.map(({ at }) => at), series, SPAN, most);
  }

  series(name) {
    return this.scrapes.map(({ samples }) => total(samples, name) ?? 0);
  }

  /** What a counter gained a second. */
  rates(name, where) {
    return this.scrapes.map((scrape, index) => {
      const from = this.scrapes[Math.max(0, index - SMOOTH)];
      const passed = scrape.at - from.at;
      return passed > 0 ? gained(from.samples, scrape.samples, name, where) / passed : 0;
    });
  }
}

function latencyRow(mode, times) {
  const cells = [counted(times.count), seconds(quantile(times, 0.5)), seconds(quantile(times, 0.95))];
  const drawn = h("td", { class: "buckets" }, strip(times.counts));
  return h("tr", {}, h("th", { scope: "row" }, mode), cells.map((text) => h("td", {}, text)), drawn);
}

function panel(title, about, className = "") {
  const keys = h("div", { class: "keys" });
  const body = h("div", { class: "body" });
  const element = h("section", { class: `panel ${className}` }, h("h2", {}, title, h("small", {}, about)), keys, body);
  const show = (drawing, entries) => {
    keys.replaceChildren(...entries);
    body.replaceChildren(drawing);
  };
  return { element, show };
}

function key(className, value, label) {
  return h("span", { class: `key ${className}` }, h("strong", {}, value), ` ${label}`);
}

function bucketLabel(low = 0, high) {
  if (!Number.isFinite(high)) return `>${low}`;
  return high - low === 1 ? String(high) : `${low + 1}–${high}`;
}
