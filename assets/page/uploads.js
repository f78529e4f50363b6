// The fields of files, and the button that starts a job.

// A picture is a video of one frame here. Gradio's field takes no file that is not called a video.

const videoInput = (node) => node.closest("#video")?.querySelector("input[type=file]");
const isPicture = (file) => file.type.startsWith("image/");

function renamedAsVideos(files) {
  const transfer = new DataTransfer();
  for (const file of files) {
    transfer.items.add(isPicture(file) ? new File([file], file.name, { type: "video/picture" }) : file);
  }
  return transfer.files;
}

document.addEventListener("click", ({ target }) => {
  const input = videoInput(target);
  if (input) input.accept = "video/*,image/*"; // before its dialog opens
}, true);
document.addEventListener("change", ({ target }) => {
  if (target.matches("#video input[type=file]") && [...target.files].some(isPicture)) target.files = renamedAsVideos(target.files);
}, true);
document.addEventListener("drop", (event) => {
  const input = videoInput(event.target), files = event.dataTransfer?.files ?? [];
  if (!input || ![...files].some(isPicture)) return;
  event.preventDefault();
  event.stopPropagation();
  event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
  input.files = renamedAsVideos(files);
  input.dispatchEvent(new Event("change", { bubbles: true }));
}, true);

// Gradio's error that a browser cannot play a video: the server may well read it, and says so if not.
new MutationObserver(() => {
  for (const toast of document.querySelectorAll(".toast-body")) {
    if (toast.textContent.includes("Video not playable")) toast.querySelector("[data-testid=toast-close]")?.click();
  }
}).observe(find(".toast-wrap"), { childList: true, subtree: true });

/** Show a look at a video: a browser knows few formats, and shows nothing of others. */
function showPicture(look) {
  const player = find("#video video");
  if (look?.picture && player) player.poster = look.picture;
}

/** Mark the thumbnail of the face that is followed. */
function markFace(face) {
  document.querySelectorAll("[data-face]").forEach((button) => button.setAttribute("aria-pressed", button.dataset.face === face));
}

/** Say that the files in the form went with the server before; returns none for each of them. */
function dropFiles(files) {
  const lost = "The server was started again and has not got your files any more: give them again.";
  if (files.some(Boolean)) startNote(lost, true);
  return files.map(() => null);
}

// One click is one job, however fast the second one follows; during an upload it is remembered.
const PAUSE = 1000; // milliseconds
let starting = false, startedAt = -PAUSE, waitsForUpload = false;

function startNote(text, isProblem) {
  setText(find("#start-note"), text);
  find("#start-note").classList.toggle("problem", Boolean(isProblem && text));
}
document.addEventListener("click", (event) => {
  if (!event.target.closest("#start")) return;
  const again = starting || performance.now() - startedAt < PAUSE;
  if (again || uploading) event.stopImmediatePropagation();
  if (again) return;
  waitsForUpload = uploading > 0;
  if (waitsForUpload) return startNote("The job starts as soon as your file is uploaded …");
  starting = true;
  startedAt = performance.now();
  startNote("Starting …");
}, true);
function afterUpload() {
  // Gradio's fields take the file over after the reply: a moment later.
  if (waitsForUpload && !uploading) setTimeout(() => { if (waitsForUpload) find("#start").click(); }, 500);
}
function onStarted(reply) {
  starting = false;
  startNote(reply?.error ?? "", true);
  if (reply && !reply.error) onReply(reply);
}
/** Make room for another video and go to its field. */
function chooseAnother() {
  find("#video [aria-label='Clear']")?.click();
  find("#video").scrollIntoView({ behavior: "smooth", block: "center" });
  setTimeout(() => find("#video button")?.focus(), 100); // Gradio draws the empty field
}
