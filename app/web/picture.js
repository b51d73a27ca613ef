/** Pixels: decoding pictures and measuring one against another. */

const GAIN = 4; // how much a difference is amplified before it is drawn

export function dataUrl(base64, format = "png") {
  return `data:image/${format};base64,${base64}`;
}

/** The RGBA pixels of a picture. */
export async function pixelsOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** PSNR in dB over the colour channels (Infinity when equal), or null where the sizes differ. */
export function psnr(one, other) {
  if (one.width !== other.width || one.height !== other.height) return null;
  let sum = 0;
  for (let i = 0; i < one.data.length; i += 1) {
    if (i % 4 !== 3) sum += (one.data[i] - other.data[i]) ** 2;
  }
  const meanSquare = sum / (one.width * one.height * 3);
  return meanSquare === 0 ? Infinity : 10 * Math.log10(255 ** 2 / meanSquare);
}

/** Draw where `picture` leaves `reference`: a grey ghost of the reference, warm where they differ. */
export function drawDifference(canvas, reference, picture) {
  const { width, height } = reference;
  const out = new ImageData(width, height);
  for (let i = 0; i < out.data.length; i += 4) {
    const [r, g, b] = [0, 1, 2].map((c) => Math.abs(reference.data[i + c] - picture.data[i + c]));
    const heat = Math.min(1, (GAIN * Math.max(r, g, b)) / 255);
    const grey = (reference.data[i] * 0.3 + reference.data[i + 1] * 0.59 + reference.data[i + 2] * 0.11) * 0.28;
    const ghost = (18 + grey) * (1 - heat);
    out.data[i] = ghost + heat * 255;
    out.data[i + 1] = ghost + heat * (96 + 120 * heat);
    out.data[i + 2] = ghost + heat * (24 + 90 * heat * heat);
    out.data[i + 3] = 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(out, 0, 0);
}

/** The base64 of a dropped picture, as the server takes it. */
export function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
