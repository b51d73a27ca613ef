/** Small drawings. They are made anew from data and keep nothing. */

import { h, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [320, 100];

/** Stacked areas over time, ending now: `times` and `span` in seconds, `series` of `{className, values}`. */
export function areas(times, series, span, most) {
  const x = times.map((time) => WIDTH * (1 - (times.at(-1) - time) / span));
  const y = (value) => HEIGHT - 1 - (value / most) * (HEIGHT - 6);
  let floor = times.map(() => 0);
  const shapes = series.flatMap(({ className, values }) => {
    const tops = values.map((value, at) => floor[at] + value);
    const edge = points(x, tops.map(y));
    const base = points(x, floor.map(y)).reverse();
    floor = tops;
    return [
      svg("polygon", { class: `area ${className}`, points: [...edge, ...base].join(" ") }),
      svg("polyline", { class: `line ${className}`, points: edge.join(" ") }),
    ];
  });
  const ground = svg("line", { class: "floor", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 });
  return svg("svg", { ...stretched(HEIGHT), class: "chart" }, ground, shapes);
}

/** Bars of a histogram, each with its label underneath. */
export function bars(counts, labels) {
  const most = Math.max(...counts, 1);
  const columns = counts.map((count, at) => {
    const bar = h("i");
    bar.style.height = `${(100 * count) / most}%`;
    return h("span", { title: String(count) }, h("span", { class: "column" }, bar), labels[at]);
  });
  return h("div", { class: "bars", "aria-hidden": "true" }, columns);
}

/** A histogram as a strip: the darker, the more fell there. */
export function strip(counts) {
  const most = Math.max(...counts, 1);
  const each = WIDTH / counts.length;
  const cells = counts.map((count, at) => {
    const cell = svg("rect", { class: "cell", x: at * each + 0.5, y: 0, width: each - 1, height: 14, rx: 1.5 });
    cell.style.opacity = String(count ? 0.25 + 0.75 * (count / most) : 0.07);
    return cell;
  });
  return svg("svg", { ...stretched(14), class: "strip" }, cells);
}

function points(x, y) {
  return x.map((value, at) => `${value.toFixed(1)},${y[at].toFixed(1)}`);
}

const stretched = (height) => ({ viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
