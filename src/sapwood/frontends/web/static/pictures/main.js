// The page that draws: the form, the progress of one picture, and the gallery.

import { apiKey, keepApiKey } from "../chat/api.js";
import { byId, element, notice } from "../chat/dom.js";
import { draw, listPainters } from "./draw.js";
import { openGallery } from "./gallery.js";

const AGAIN_MS = 3000;
const FIELDS = ["prompt", "negative", "width", "height", "steps", "seed", "guidance"];

let painters = [];
let stop = null;

const gallery = await openGallery(fill);
byId("api-key").value = apiKey();
byId("api-key").addEventListener("change", ({ target }) => {
  keepApiKey(target.value);
  showModels();
});
byId("model").addEventListener("change", showDefaults);
byId("draw").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!stop) start();
});
byId("stop").addEventListener("click", () => stop?.());
showModels();

async function showModels() {
  let why = "no model here draws";
  try {
    const found = await listPainters();
    painters = found.painters;
    byId("to-chat").hidden = !found.canChat;
  } catch (error) {
    why = error.status === 401 ? "needs an API key" : "not ready";
    if (error.status !== 401) setTimeout(showModels, AGAIN_MS);
  }
  const options = painters.map(({ id }) => element("option", { value: id }, id));
  if (!options.length) options.push(element("option", { value: "" }, why));
  byId("model").replaceChildren(...options);
  showDefaults();
}

const chosen = () => painters.find(({ id }) => id === byId("model").value);

function showDefaults() {
  const { defaults = {}, maxPictures = 0, needsPicture = false } = chosen() ?? {};
  byId("width").placeholder = defaults.width ?? "";
  byId("height").placeholder = defaults.height ?? "";
  byId("steps").placeholder = defaults.num_inference_steps ?? "";
  byId("guidance").placeholder = defaults.guidance_scale ?? "";
  byId("bring").hidden = maxPictures === 0;
  byId("picture").required = needsPicture;
}

/** The fields of a request, of what is filled in. */
function asked() {
  const value = (name) => byId(name).value.trim();
  const { width, height } = chosen()?.defaults ?? {};
  const fields = { prompt: value("prompt") };
  if (value("negative")) fields.negative_prompt = value("negative");
  if (value("width") || value("height"))
    fields.size = `${value("width") || width}x${value("height") || height}`;
  if (value("steps")) fields.num_inference_steps = Number(value("steps"));
  if (value("seed")) fields.seed = Number(value("seed"));
  if (value("guidance")) fields.guidance_scale = Number(value("guidance"));
  return fields;
}

function fill(fields) {
  const [width, height] = fields.size?.split("x") ?? ["", ""];
  const values = {
    prompt: fields.prompt,
    negative: fields.negative_prompt,
    width,
    height,
    steps: fields.num_inference_steps,
    seed: fields.seed,
    guidance: fields.guidance_scale,
  };
  for (const name of FIELDS) byId(name).value = values[name] ?? "";
  byId("prompt").focus();
}

async function start() {
  const controller = new AbortController();
  const fields = asked();
  stop = () => controller.abort();
  show(true);
  try {
    const [picture] = byId("bring").hidden ? [] : byId("picture").files;
    const body = { ...fields, ...(chosen() && { model: chosen().id }) };
    const drawn = await draw(body, picture, tell, controller.signal);
    await gallery.add({ ...drawn, fields });
    byId("status").textContent = "Done.";
  } catch (error) {
    if (!controller.signal.aborted) notice(error.message, { isError: true });
    byId("status").textContent = controller.signal.aborted ? "Stopped." : "";
  }
  stop = null;
  show(false);
}

function tell({ step, numSteps, partial }) {
  if (partial) {
    byId("canvas").hidden = false;
    byId("partial").src = partial;
    return;
  }
  byId("progress").value = step / numSteps;
  byId("status").textContent = `Step ${step} of ${numSteps}`;
}

function show(isDrawing) {
  byId("start").disabled = isDrawing;
  byId("stop").hidden = !isDrawing;
  byId("progress").hidden = !isDrawing;
  byId("progress").value = 0;
  if (isDrawing) byId("status").textContent = "Waiting for the first step";
  byId("canvas").hidden = true;
  byId("partial").removeAttribute("src");
}
