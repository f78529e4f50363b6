// Calls of the server's endpoints.

const SECOND = 1000, REPLY_TIMEOUT = 30 * SECOND;
const NO_REPLY = "The server did not answer: see whether it still runs, and try again.";
const LOGIN = "The server wants a login again: reload the page";
const root = (window.gradio_config?.root || location.href.split(/[?#]/)[0]).replace(/\/$/, "");
const send = window.fetch.bind(window);

// The visitor's token cannot be guessed, and stays in this browser.
const letters = String.fromCharCode(...crypto.getRandomValues(new Uint8Array(24)));
const visitor = remembered.get("latentsync-visitor") || btoa(letters).replace(/\+/g, "-").replace(/\//g, "_");
remembered.set("latentsync-visitor", visitor);

// Where Gradio finds no server for a request, it ignores whatever follows, and loads the page again once there is a
// server: settings would be lost. So its requests wait here until a server answers. That of a job is not sent a second
// time, as the first may have arrived.
let uploading = 0; // files on their way to the server
window.fetch = async (input, init) => {
  const url = String(input?.url ?? input);
  if (url.includes("/gradio_api/upload?") || url.endsWith("/gradio_api/upload")) {
    uploading += 1;
    forgetNote();
    return send(input, init).finally(() => { uploading -= 1; afterUpload(); });
  }
  if (!url.includes("/gradio_api/run/")) return send(input, init);
  for (;;) {
    try {
      return await send(input, init);
    } catch (error) {
      if (init?.signal?.aborted) throw error;
      if (String(init?.body).includes(visitor)) return Response.json({ data: [{ error: NO_REPLY }] });
      await new Promise((resolve) => setTimeout(resolve, SECOND));
    }
  }
};

async function call(name, ...data) {
  const response = await send(`${root}/gradio_api/run/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ data }),
    signal: AbortSignal.timeout(REPLY_TIMEOUT), // a server that went away meanwhile may never answer
  });
  if (response.status === 401) throw new Error(LOGIN);
  const reply = await response.json().catch(() => ({}));
  if (!reply.data && !reply.error) throw new Error(`${name}: ${response.status}`);
  return reply.error ? { error: reply.error } : reply.data[0];
}

const WITHOUT_VISITOR = ["fetch", "stop_fetching", "remove_model"]; // models are everybody's

document.addEventListener("click", async ({ target }) => {
  const button = target.closest("[data-call]");
  if (!button || (button.dataset.question && !confirm(button.dataset.question))) return;
  const [name, ...data] = JSON.parse(button.dataset.call);
  button.disabled = true;
  try {
    onReply(await call(name, ...data, ...(WITHOUT_VISITOR.includes(name) ? [] : [visitor])));
  } catch {
    notice(NO_REPLY);
  }
  button.disabled = false;
});

/** Show what an endpoint replied to something that the visitor did. */
async function onReply(reply) {
  if (!reply) return;
  notice(reply.error);
  if (reply.error) return find("#notice").scrollIntoView({ behavior: "smooth", block: "nearest" });
  await refresh();
  await refresh(); // the first may have been under way before
  const card = reply.visitor && cards.get(reply.job)?.card; // of a new job
  if (card) card.scrollIntoView({ behavior: "smooth", block: innerWidth < 900 ? "start" : "nearest" });
}
