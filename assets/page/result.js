// The result of a job in its card: beside the original, with what it was made with and how long that took.

const row = ([name, value]) => html`<tr><th scope="row">${name}</th><td>${value}</td></tr>`;
const table = (caption, rows) => html`<table><caption>${caption}</caption>${Object.entries(rows).map(row)}</table>`;
const inSeconds = (seconds) => `${seconds.toFixed(2)} s`;

function settingsUsed({ settings, level, model, resolution, device, frames, frames_without_face: faceless }) {
  return {
    level,
    model: `${model}, ${resolution} px, on ${device}`,
    steps: settings.steps,
    "lip strength": settings.guidance_scale,
    seed: settings.seed,
    DeepCache: settings.cache ? `every ${settings.cache.interval} steps` : "off",
    face: settings.face,
    "silence gate": settings.silence_gate ? "on" : "off",
    "output quality": `CRF ${settings.crf}`,
    frames: faceless ? `${frames}, ${faceless} without a usable face` : frames,
  };
}

function adviceItem({ severity, problem, remedy }) {
  const heading = severity[0].toUpperCase() + severity.slice(1);
  return html`<li class="${severity}"><b>${heading}</b> ${problem} <span>${remedy}</span></li>`;
}

function showResult(view, job) {
  const box = find(".result", view.card), name = fileName(job.files.result), ratio = ratioOf(job);
  const url = (file) => `${root}/lipsync/${job.files[file]}`;
  const seconds = Object.entries(job.report.seconds).map(([stage, time]) => [stage, inSeconds(time)]);
  const question = `Remove ${name} and all else of this job from the machine that made it?`;
  box.innerHTML = html`
    <div class="pair">
      <figure>
        <video class="original" muted playsinline preload="metadata" src="${url("original")}" style="${ratio}"
          aria-label="Original, without sound"></video>
        <figcaption>Original, in step, without sound</figcaption>
      </figure>
      <figure>
        <video class="made" controls playsinline preload="metadata" src="${url("result")}" style="${ratio}"
          aria-label="Result"></video>
        <figcaption>Result</figcaption>
      </figure>
    </div>
    <div class="buttons">
      <a class="button main" href="${url("result")}" download="${name}">Download</a>
      <span class="beside"></span>
      <button type="button" class="soft compare" aria-pressed="true" title="Show the original beside the result">Original</button>
      <button type="button" class="soft reuse">Use these settings</button>
      ${callButton("Remove", ["remove", job.id], "soft", question)}
    </div>
    <p class="error comparison" role="alert" hidden></p>
    <details>
      <summary>Settings, time and advice</summary>
      <div class="tables">
        ${table("Settings used", settingsUsed(job.report))}
        ${table("Seconds each stage was busy", {
          ...Object.fromEntries(seconds), "in all (stages overlap)": inSeconds(job.report.total_seconds),
        })}
      </div>
      <div class="timeline" role="img" aria-label="Use of the machine during the job, with its stages"></div>
      ${job.messages.map((message) => html`<p class="message">${message}</p>`)}
      ${job.advice.length ? html`<ul class="advice">${job.advice.map(adviceItem)}</ul>` : null}
    </details>`;
  const original = find(".original", box), figure = original.parentElement, compare = find(".compare", box);
  showOriginal(original, find("figcaption", figure), url("original"));
  follow(find(".made", box), original);
  compare.onclick = () => {
    figure.hidden = !figure.hidden;
    compare.setAttribute("aria-pressed", String(!figure.hidden));
  };
  find(".reuse", box).onclick = () => trigger("select", { settings: job.settings });
  const plot = find(".timeline", box), failed = "The curves cannot be drawn now: close this, and open it again.";
  find("details", box).ontoggle = ({ target }) => target.open && drawTimeline(plot, job).catch(() => setText(plot, failed));
  view.comparison = null;
  setShown(box, true);
}

/** A picture is shown as a poster; a video that this browser does not know gets a sentence. */
function showOriginal(player, caption, url) {
  player.muted = true; // the attribute has no effect in markup
  if (/\.(png|jpe?g|webp|bmp|gif|avif)$/i.test(url)) {
    player.poster = url;
    return setText(caption, "Original, a picture");
  }
  const unknown = () => setText(caption, "Original: this browser cannot play its format");
  player.addEventListener("error", unknown);
  player.addEventListener("loadedmetadata", () => player.videoWidth || unknown()); // it may know the sound alone
}

/** Let `follower` play along with `leader`. Where it is shorter, it is shown forward and backward. */
function follow(leader, follower) {
  const turn = () => leader.currentTime % (2 * follower.duration);
  const backward = () => follower.duration && turn() > follower.duration;
  const align = () => {
    if (!follower.duration) return;
    const place = backward() ? 2 * follower.duration - turn() : turn();
    if (Math.abs(follower.currentTime - place) > 0.12) follower.currentTime = place;
  };
  const stop = () => { follower.pause(); align(); };
  const start = () => { align(); follower.play().catch(() => {}); };
  leader.addEventListener("play", () => (backward() ? align() : start()));
  leader.addEventListener("pause", stop);
  leader.addEventListener("seeking", align);
  leader.addEventListener("ratechange", () => { follower.playbackRate = leader.playbackRate; });
  leader.addEventListener("timeupdate", () => {
    if (backward()) stop();
    else if (!leader.paused && follower.paused) start();
  });
}

/** The button that makes a video of original and result side by side, how far that is, and the link to it. */
function updateComparison(view, job) {
  const { state = "none", done = 0, total = 0, error } = job.comparison ?? {}, key = `${state} ${done}`;
  if (view.comparison === key) return;
  view.comparison = key;
  const box = find(".beside", view.card), message = find(".comparison", view.card);
  const part = job.compared_seconds < job.frames / 25 - 1;
  const length = part ? `, of the first ${Math.round(job.compared_seconds / 60)} minutes` : "";
  box.title = `A video of original and result next to each other, with the new sound${length}`;
  const progress = state === "waiting" ? "waits for another" : `${total ? Math.floor((100 * done) / total) : 0} %`;
  const label = `Side by side: ${progress} · stop`, stop = find(".making", box);
  if (state === "done") {
    const file = job.files.compared;
    box.innerHTML = html`<a class="button" href="${root}/lipsync/${file}" download="${fileName(file)}">Download side by side</a>`;
  } else if (state !== "running" && state !== "waiting") {
    box.innerHTML = callButton("Side by side", ["compare", job.id]);
  } else if (stop) {
    setText(stop, label);
  } else {
    box.innerHTML = callButton(label, ["cancel", job.id, false], "soft making");
  }
  setShown(message, Boolean(error));
  setText(message, error || "");
}
