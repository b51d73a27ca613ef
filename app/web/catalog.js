/** What the server offers, in the page's words: the one place that knows the shape of its lists. */

export function fromServer(modelList) {
  const models = modelList.data.map((model) => ({
    ...model,
    accelerators: model.accelerators.map(({ parameters, ...facts }) => ({ ...facts, schema: parameters })),
    defaults: {
      width: model.native_width,
      height: model.native_height,
      num_inference_steps: model.default_num_inference_steps,
      guidance_scale: model.default_guidance_scale,
      scheduler: model.default_scheduler,
      strength: 0.8,
      image_guidance_scale: model.default_image_guidance_scale,
      timestep_warp: 1,
      class_label: model.conditioning === "class" ? 0 : null,
    },
  }));
  return { models, jobs: modelList.jobs, first: models.find((model) => model.default) ?? models[0] };
}
