// Released models: which are here, which suits this machine, and fetching others.

const NOT_NOW = "latentsync-not-now";
const TASK_STATES = { running: "Working", done: "Done", stopped: "Stopped", failed: "Failed" };
let models = null; // what /models replied
let modelsVersion = null; // of that reply; null before the first one
let fetching = null; // the task that runs, or the last one

const findModel = (name) => models?.models?.find((model) => model.name === name);
const isBegun = (model) => model.to_fetch > 0 && model.size > 0;

/** The lines of a licence notice, with their addresses as links. */
function licenceList(lines) {
  const link = (part) => (part.startsWith("https://")
    ? html`<a href="${part}" target="_blank" rel="noreferrer">${part.slice(8)}</a>` : part);
  const items = lines.map((line) => html`<li>${line.trim().split(/(https:\/\/[^\s)]+)/).map(link)}</li>`);
  return html`<ul class="licences">${items}</ul>`;
}

function fetchButton(model, kind) {
  const label = isBegun(model) ? `Continue (${sizeText(model.to_fetch)} left)`
    : model.to_fetch ? `Fetch ${sizeText(model.to_fetch)}` : "Prepare it for fast starts";
  return callButton(label, ["fetch", model.name, "get"], kind);
}

function modelState(model) {
  if (!model.present) return `${isBegun(model) ? "not complete" : "not here"}, ${sizeText(model.to_fetch)} to fetch`;
  return model.converted ? `here, ${sizeText(model.size)}` : "here; starts faster once it is prepared";
}

function modelButtons(model) {
  const buttons = [], original = "(the original, not needed any more)";
  if (!models.allowed || fetching?.state === "running") return buttons;
  if (!model.converted && !(models.offline && model.to_fetch)) {
    buttons.push(fetchButton(model, model.name === models.recommended ? "main" : "soft"));
  }
  if (model.present && model.converted) buttons.push(callButton("Verify", ["fetch", model.name, "verify"]));
  if (model.pickle) {
    buttons.push(callButton(`Free ${sizeText(model.pickle)} ${original}`, ["remove_model", model.name, true]));
  }
  if (model.size) {
    const question = `Remove ${model.title} from this machine (${sizeText(model.size)})?`;
    buttons.push(callButton("Remove", ["remove_model", model.name, false], "soft", question));
  }
  return buttons;
}

function modelArticle(model) {
  const best = model.name === models.recommended, buttons = modelButtons(model);
  const by_hand = models.offline && model.to_fetch && models.allowed;
  return html`
    <article data-model="${model.name}" data-present="${model.present}">
      <div class="row">
        <h2>${model.title}, ${model.resolution} px${best ? html`<span class="best"> recommended here</span>` : null}</h2>
        <span class="quiet">${modelState(model)}</span>
      </div>
      ${model.present
        ? html`<details><summary>Licences</summary>${licenceList(model.notice.slice(1))}</details>`
        : licenceList(model.notice)}
      ${model.remark ? html`<p class="quiet">${withCode(model.remark)}</p>` : null}
      ${by_hand ? html`<p class="quiet">HF_HUB_OFFLINE forbids to fetch it: start without that variable, or put its files
        into ${model.folder} (see docs/models.md).</p>` : null}
      ${buttons.length ? html`<div class="buttons">${buttons}</div>` : null}
    </article>`;
}

/** Whether a box is to be made anew: what it shows has changed. */
function hasChanged(box, key) {
  if (box.dataset.shown === key) return false;
  box.dataset.shown = key;
  return true;
}

function renderModels() {
  const box = find("#models"); // there once its accordion was opened
  if (!models || !box || !hasChanged(box, `${modelsVersion} ${fetching?.id} ${fetching?.state}`)) return;
  const { error, chosen, remark, recommended, why, allowed } = models;
  box.innerHTML = error ? html`<p class="problem">${error}</p>` : html`
    <p class="why">Auto is ${chosen} here. ${withCode(remark ?? "")} ${chosen === recommended ? "" : "What suits this machine: "}${why}</p>
    ${models.models.map(modelArticle)}
    ${allowed ? null : html`<p class="quiet">Visitors of this server cannot fetch models.</p>`}`;
}

/** Offer the recommended model where there is none but the demo model. */
function renderOffer() {
  const box = find("#offer"), model = findModel(models?.recommended);
  const wanted = model && models.allowed && !models.offline && !models.models.some((each) => each.present)
    && !fetching && remembered.get(NOT_NOW) !== model.name;
  setShown(box, Boolean(wanted));
  if (!wanted || !hasChanged(box, String(modelsVersion))) return;
  box.innerHTML = html`
    <p><b>This machine can do better than the demo model. </b>${models.why}</p>
    ${licenceList(model.notice)}
    <div class="buttons">${fetchButton(model, "main")}<button type="button" class="soft later">Not now</button></div>`;
  find(".later", box).onclick = () => { remembered.set(NOT_NOW, model.name); setShown(box, false); };
}

function renderFetching() {
  const box = find("#fetching"), task = fetching;
  const shown = Boolean(task) && box.dataset.closed !== task.id;
  setShown(box, shown);
  if (!shown) return;
  const running = task.state === "running", allowed = models?.allowed;
  if (hasChanged(box, `${task.id} ${task.state} ${allowed}`)) {
    const title = findModel(task.name)?.title || task.name, getting = task.task === "get";
    const resumable = !running && allowed && task.state !== "done";
    box.dataset.state = task.state;
    box.innerHTML = html`
      <div class="row">
        <h2>${getting ? "Fetching" : "Verifying"} ${title}</h2>
        <span class="state" role="status">${TASK_STATES[task.state]}</span>
      </div>
      ${running ? html`<progress max="1" aria-label="Progress of ${title}"></progress>` : null}
      ${task.error
        ? html`<p class="error" role="alert">${task.error}</p>`
        : html`<p class="doing"><span class="what"></span><span class="amount"></span></p>`}
      <div class="buttons">
        ${running && allowed ? callButton("Cancel", ["stop_fetching"]) : null}
        ${resumable ? callButton(getting ? "Continue" : "Verify again", ["fetch", task.name, task.task], "main") : null}
        ${running ? null : html`<button type="button" class="soft close">Close</button>`}
      </div>`;
    find(".close", box)?.addEventListener("click", () => { box.dataset.closed = task.id; setShown(box, false); });
  }
  const bar = find("progress", box), amounts = [];
  if (bar && task.total) bar.value = task.done / task.total;
  else bar?.removeAttribute("value");
  if (running && task.total) amounts.push(`${sizeText(task.done)} of ${sizeText(task.total)}`);
  if (task.speed != null) amounts.push(`${sizeText(task.speed)}/s`);
  if (task.seconds_left != null) amounts.push(`about ${clockText(task.seconds_left)} left`);
  if (task.error) return;
  setText(find(".what", box), task.doing);
  setText(find(".amount", box), amounts.map((amount) => ` · ${amount}`).join(""));
}

/** version: of what /models says; null before the server has looked at its machine. */
async function updateModels(version, task) {
  fetching = task;
  if (version != null && version !== modelsVersion) {
    const first = modelsVersion === null;
    models = await call("models");
    modelsVersion = version;
    if (!first) trigger("input", {}); // the dropdown, too
  }
  renderModels();
  renderOffer();
  renderFetching();
}
