/** One comparison: the same request through every lane at the same time, then each lane by itself for its own time. */

import { generate } from "./api.js";

const PREVIEWS = 6; // pictures a lane shows on its way, at most

/**
 * Run `lanes`. `bodyOf(lane)` is a lane's request; `onerror(lane, error)` places an error; `onphase(text)` says where
 * it stands. Throws only what concerns the page as a whole: a missing key, a server that is gone.
 */
export async function compare({ lanes, bodyOf, signatureOf, signal, timeAlone, onerror, onphase }) {
  for (const lane of lanes) lane.start();
  onphase(lanes.length > 1 ? `Running ${lanes.length} together` : "Running");
  const outcomes = await Promise.allSettled(
    lanes.map((lane) => runLane(lane, bodyOf(lane), signatureOf(lane), signal, onerror)),
  );
  const broken = outcomes.find(({ status }) => status === "rejected");
  if (broken) throw broken.reason;
  const finished = lanes.filter((lane) => lane.result);
  if (!timeAlone || lanes.length < 2) return finished;
  for (const [at, lane] of finished.entries()) {
    if (signal.aborted) break;
    onphase(`Timing each alone, ${at + 1} of ${finished.length}`);
    await timeLane(lane, bodyOf(lane), signal);
  }
  return finished;
}

async function runLane(lane, body, signature, signal, onerror) {
  const steps = body.num_inference_steps ?? 2;
  const previews = Math.max(0, Math.min(PREVIEWS, steps - 1));
  try {
    for await (const { event, data } of generate({ ...body, partial_images: previews }, signal)) {
      if (event === "queued") lane.queued(data);
      if (event === "progress") lane.progress(data);
      if (event === "partial_image") lane.preview(data);
      if (event === "completed") await lane.complete(data, signature);
    }
  } catch (error) {
    if (signal.aborted) return lane.cancelled();
    if (error.status === 401 || error.status === undefined) {
      lane.skip();
      throw error;
    }
    onerror(lane, error);
  }
}

async function timeLane(lane, body, signal) {
  try {
    for await (const { event, data } of generate({ ...body, partial_images: 0 }, signal)) {
      if (event === "completed") await lane.timed(data);
    }
  } catch (error) {
    if (!signal.aborted && error.status === undefined) throw error; // a refusal here only leaves the time unmeasured
  }
}
