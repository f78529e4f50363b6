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

/** Say that the files in the form went with the server before; returns none for each of them. */
function dropFiles(files) {
  if (files.some(Boolean)) notice("The server was started again and has not got your files any more: give them again.");
  return files.map(() => null);
}
