// What a server that draws is asked, and what it says while it does.

import { ApiError, ask, lost } from "../chat/api.js";

const PARTIAL = 2;

/** The models that draw: {id, defaults, maxPictures, needsPicture}; and whether any can chat. */
export async function listPainters() {
  const { data } = await (await ask("v1/models", {})).json();
  const painters = data
    .filter((card) => card.task === "text-to-image")
    .map((card) => ({
      id: card.id,
      defaults: card.defaults ?? {},
      maxPictures: card.max_input_pictures ?? 0,
      needsPicture: card.needs_picture === true,
    }));
  return { painters, canChat: data.some((card) => card.is_generation !== false) };
}

/**
 * Draw one picture. `tell` is called with {step, numSteps}, and with {partial} as a data URL.
 * Returns {url, seed, size}. Raises ApiError; AbortError once `signal` says so.
 */
export async function draw(fields, picture, tell, signal) {
  const body = { ...fields, n: 1, stream: true, partial_images: PARTIAL, output_format: "png" };
  const options = { method: "POST", signal };
  if (picture) {
    options.body = new FormData();
    for (const [name, value] of Object.entries(body)) options.body.append(name, String(value));
    options.body.append("image", picture);
  } else {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  const path = picture ? "v1/images/edits" : "v1/images/generations";
  const response = await ask(path, options);
  for await (const event of events(response.body, signal)) {
    if (event.error) throw new ApiError(event.error.message, event.error.code ?? 0);
    if (event.numSteps) tell(event);
    else if (event.type.endsWith(".partial_image")) tell({ partial: urlOf(event) });
    else return { url: urlOf(event), seed: event.seed, size: event.size };
  }
  throw lost();
}

const urlOf = (event) => `data:image/${event.output_format};base64,${event.b64_json}`;

/** The JSON of each event, and {step, numSteps} of each comment that says so. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      throw signal.aborted ? error : lost();
    }
    if (piece.done) return;
    pending += piece.value;
    const complete = pending.split("\n\n");
    pending = complete.pop();
    for (const event of complete) {
      const step = /^: step (\d+) of (\d+)$/.exec(event);
      if (step) yield { step: Number(step[1]), numSteps: Number(step[2]) };
      const data = event.split("\n").find((line) => line.startsWith("data:"));
      if (data) yield JSON.parse(data.slice("data:".length));
    }
  }
}
