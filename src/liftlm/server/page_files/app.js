"use strict";
// The page: a client of the same API as every other. No framework, nothing fetched from elsewhere.

const $ = (id) => document.getElementById(id);
const state = { key: sessionStorage.getItem("lift-key") || "", base: "", documents: [], open: null, follow: null, talk: new Map(), asking: null };

// --- talking to the server -------------------------------------------------------------------------------------------

class Failure extends Error {}

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Check that it is running.");
  }
  if (reply.status === 401) {
    await askKey();
    return call(path, options);
  }
  if (!reply.ok) throw new Failure(sentence(await reply.text()));
  return reply;
}

function sentence(body) {
  try {
    return JSON.parse(body).error.message;
  } catch {
    return "The server answered with an error that cannot be read.";
  }
}

let keyAsked = null;
function askKey() {
  if (!keyAsked) {
    keyAsked = new Promise((done) => {
      $("key-dialog").addEventListener("close", () => {
        state.key = $("key").value.trim();
        sessionStorage.setItem("lift-key", state.key);
        keyAsked = null;
        done();
      }, { once: true });
      $("key-dialog").showModal();
    });
  }
  return keyAsked;
}

async function* events(reply) {
  // server-sent events of a fetch, since EventSource can send no key
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      const name = (block.split("\n").find((line) => line.startsWith("event: ")) || "").slice(7);
      if (data) yield { name, data };
    }
  }
}

function complain(error) {
  if (error && error.name === "AbortError") return;
  if (!(error instanceof Failure)) console.error(error);
  $("problem").firstElementChild.textContent = error instanceof Failure ? error.message : "Something went wrong on this page. Reload it.";
  $("problem").hidden = false;
}
const guarded = (work) => async (...given) => {
  try {
    return await work(...given);
  } catch (error) {
    complain(error);
  }
};

// --- the library -----------------------------------------------------------------------------------------------------

async function loadDocuments() {
  const search = $("search").value.trim();
  const reply = await call(`/v1/documents?search=${encodeURIComponent(search.slice(0, 200))}`);
  state.documents = (await reply.json()).data;
  showList();
}

function showList() {
  const search = $("search").value.trim(), list = $("documents");
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.id : null;
  list.replaceChildren(...state.documents.map(listed));
  if (focused) list.querySelector(`[data-id="${focused}"]`)?.focus();
  $("no-documents").hidden = state.documents.length > 0;
  $("no-documents").textContent = search ? "No document matches." : "Nothing here yet.";
}

function listed(card) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const title = document.createElement("b");
  const small = document.createElement("small");
  button.type = "button";
  button.dataset.id = card.id;
  button.setAttribute("aria-current", String(state.open !== null && state.open.id === card.id));
  title.textContent = card.title;
  small.textContent = describe(card);
  if (card.state === "failed") small.className = "failed";
  button.append(title, small);
  button.addEventListener("click", guarded(() => openDocument(card)));
  item.append(button);
  return item;
}

function describe(card) {
  const tokens = `${card.tokens.toLocaleString("en")} tokens`;
  if (card.state === "ready") return tokens;
  if (card.state === "absorbing") return `absorbing, ${Math.round(100 * card.job.progress)} % · ${tokens}`;
  return { queued: `waiting · ${tokens}`, failed: "failed", cancelled: "cancelled" }[card.state];
}

function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  return minutes >= 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes}:${String(whole % 60).padStart(2, "0")}`;
}

function send(form, file) {
  // XMLHttpRequest, since fetch does not tell how much is sent
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/documents");
    if (state.key) request.setRequestHeader("Authorization", `Bearer ${state.key}`);
    $("sending").hidden = !file;
    request.upload.addEventListener("progress", (event) => { $("sending").value = event.lengthComputable ? event.loaded / event.total : 0; });
    request.addEventListener("load", () => {
      if (request.status === 202) done(JSON.parse(request.responseText));
      else failed(new Failure(sentence(request.responseText)));
    });
    request.addEventListener("error", () => failed(new Failure("The upload was broken off. Try again.")));
    request.send(form);
  });
}

async function absorb(event) {
  event.preventDefault();
  const file = $("file").files[0], text = $("text").value;
  if (!file && !text.trim()) throw new Failure("Choose a file or paste some text first.");
  if (file && text.trim()) throw new Failure("There is both a file and pasted text. Remove one of them.");
  const form = new FormData();
  if ($("title").value.trim()) form.append("title", $("title").value.trim());
  if ($("epochs").value) form.append("settings", JSON.stringify({ training: { epochs: Number($("epochs").value) } }));
  if (file) form.append("file", file); else form.append("text", text);
  $("absorb").disabled = true;
  $("absorb").textContent = "Sending and reading…";
  try {
    const card = await send(form, file);
    $("upload").reset();
    $("upload").querySelector("details").open = false;
    showFileName();
    await loadDocuments();
    await openDocument(card);
  } finally {
    $("absorb").disabled = false;
    $("absorb").textContent = "Absorb";
    $("sending").hidden = true;
  }
}

function showFileName() {
  const file = $("file").files[0];
  $("file-name").textContent = file ? file.name : "Choose a file or drop one here: PDF, EPUB, DOCX, HTML, Markdown, text";
}

// --- one document ----------------------------------------------------------------------------------------------------

async function openDocument(card) {
  if (state.asking) state.asking.abort();
  if (state.follow) state.follow.abort();
  state.open = card;
  $("problem").hidden = true;
  location.hash = card.id;
  document.body.classList.add("one-document");
  $("welcome").hidden = true;
  $("opened").hidden = false;
  $("talk").replaceChildren(...(state.talk.get(card.id) || []).map((turn) => turn.element));
  for (const button of $("documents").querySelectorAll("button")) button.setAttribute("aria-current", String(button.dataset.id === card.id));
  chooseTab(card.state === "ready" ? "chat" : "curve");
  show(card);
  await drawCurve();
  if (card.state === "queued" || card.state === "absorbing") follow(card);
}

function show(card) {
  state.open = card;
  const busy = card.state === "queued" || card.state === "absorbing";
  $("document-title").textContent = card.title;
  const words = { ready: "ready", queued: "waiting for its turn", absorbing: "being absorbed", failed: "failed", cancelled: "cancelled" };
  $("facts").textContent = [card.file_name, `${card.tokens.toLocaleString("en")} tokens`, words[card.state], `id ${card.id}`].join(" · ");
  $("absorbing").hidden = !busy;
  $("progress").value = card.job.progress;
  $("step").textContent = card.job.steps ? `${card.job.step} of ${card.job.steps}` : "–";
  $("loss").textContent = card.job.loss === null ? "–" : card.job.loss.toFixed(3);
  $("speed").textContent = card.job.tokens_per_second === null ? "–" : Math.round(card.job.tokens_per_second).toLocaleString("en");
  $("left").textContent = clock(card.job.seconds_left);
  $("tab-chat").disabled = card.state !== "ready";
  if (card.state === "failed") complain(new Failure(card.job.error || "The document could not be absorbed."));
}

async function follow(card) {
  const stopper = state.follow = new AbortController();
  try {
    const reply = await call(`/v1/documents/${card.id}/events`, { signal: stopper.signal });
    for await (const event of events(reply)) {
      if (event.name !== "document") continue;
      const now = JSON.parse(event.data);
      if (state.open === null || state.open.id !== now.id) return;
      show(now);
      state.documents = state.documents.map((known) => (known.id === now.id ? now : known));
      showList();
      await drawCurve();
      if (now.state === "ready") {
        chooseTab("chat");
        $("question").focus();
      }
    }
    await loadDocuments();
  } catch (error) {
    complain(error);
  }
}

function close() {
  if (state.follow) state.follow.abort();
  if (state.asking) state.asking.abort();
  state.open = null;
  history.replaceState(null, "", location.pathname);
  document.body.classList.remove("one-document");
  $("welcome").hidden = false;
  $("opened").hidden = true;
  for (const button of $("documents").querySelectorAll("button")) button.setAttribute("aria-current", "false");
}

async function remove() {
  const card = state.open;
  $("delete-what").textContent = `“${card.title}” and what was learnt from it.`;
  $("delete-dialog").returnValue = "no";
  $("delete-dialog").showModal();
  await new Promise((done) => $("delete-dialog").addEventListener("close", done, { once: true }));
  if ($("delete-dialog").returnValue !== "yes") return;
  await call(`/v1/documents/${card.id}`, { method: "DELETE" });
  state.talk.delete(card.id);
  close();
  await loadDocuments();
  $("search").focus();
}

function chooseTab(name) {
  for (const other of ["chat", "tasks", "curve"]) {
    const chosen = other === name;
    $(`tab-${other}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${other}`).tabIndex = chosen ? 0 : -1;
    $(`panel-${other}`).hidden = !chosen;
  }
  if (name === "tasks") guarded(loadTasks)(0);
}

// --- asking ----------------------------------------------------------------------------------------------------------

// what is written above the question box must not push it out of sight, unless the reader has scrolled away from it
function keepUp(write) {
  const near = $("ask").getBoundingClientRect().bottom <= window.innerHeight + 120;
  write();
  if (near) $("ask").scrollIntoView({ block: "end" });
}

async function ask(event) {
  event.preventDefault();
  const question = $("question").value.trim(), card = state.open;
  if (!question || state.asking) return;
  const turns = state.talk.get(card.id) || [];
  state.talk.set(card.id, turns);
  const turn = { question, answer: null, element: document.createElement("div") };
  turn.element.className = "turn";
  const asked = document.createElement("div");
  asked.className = "asked";
  asked.textContent = question;
  const answers = document.createElement("div");
  answers.className = "answers";
  turn.element.append(asked, answers);
  const stopper = state.asking = new AbortController();
  $("question").value = "";
  $("send").hidden = true;
  $("stop").hidden = false;
  keepUp(() => $("talk").append(turn.element));
  const compare = $("compare").checked;
  const messages = [];
  for (const earlier of turns) {
    if (earlier.answer) messages.push({ role: "user", content: earlier.question }, { role: "assistant", content: earlier.answer });
  }
  messages.push({ role: "user", content: question });
  turns.push(turn);
  const body = { model: card.id, messages, context: $("context").value };
  const work = [stream(answers, compare ? "With the document" : card.title, body, stopper)];
  if (compare) work.push(stream(answers, "Without the document", { model: state.base, messages: [messages.at(-1)] }, stopper));
  turn.answer = (await Promise.all(work))[0];
  state.asking = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  if (state.open && state.open.id === card.id) $("question").focus();
}

async function stream(place, heading, body, stopper) {
  const box = document.createElement("div"), title = document.createElement("h3"), text = document.createElement("p"), cost = document.createElement("small");
  box.className = "answer";
  box.setAttribute("aria-busy", "true");
  title.textContent = heading;
  box.append(title, text, cost);
  keepUp(() => place.append(box));
  const began = performance.now();
  let first = null;
  try {
    const reply = await completions(body, stopper);
    for await (const event of events(reply)) {
      if (event.data === "[DONE]") break;
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new Failure(chunk.error.message);
      const piece = chunk.choices.length ? chunk.choices[0].delta.content || "" : "";
      if (piece && first === null) first = performance.now() - began;
      keepUp(() => { text.textContent += piece; });
      if (chunk.usage) {
        const seconds = (performance.now() - began) / 1000;
        keepUp(() => { cost.textContent = `${chunk.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s, first after ${((first || 0) / 1000).toFixed(1)} s`; });
      }
    }
    if (!text.textContent) cost.textContent = "The model answered with nothing.";
    return text.textContent;
  } catch (error) {
    if (error.name === "AbortError") {
      cost.textContent = "stopped";
      return text.textContent;
    }
    text.className = "failed";
    text.textContent = error instanceof Failure ? error.message : "Something went wrong on this page. Reload it.";
    return null;
  } finally {
    box.setAttribute("aria-busy", "false");
  }
}

async function completions(body, stopper) {
  // old turns leave when the window is full
  const messages = [...body.messages];
  for (;;) {
    try {
      return await call("/v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...body, messages, stream: true, stream_options: { include_usage: true } }),
        signal: stopper.signal,
      });
    } catch (error) {
      if (!(error instanceof Failure) || !error.message.includes("window") || messages.length < 3) throw error;
      messages.splice(0, 2);
    }
  }
}

// --- tasks and loss --------------------------------------------------------------------------------------------------

let tasksShown = 0;
async function loadTasks(offset) {
  const search = encodeURIComponent($("task-search").value.trim().slice(0, 200));
  const found = await (await call(`/v1/documents/${state.open.id}/tasks?limit=50&offset=${offset}&search=${search}`)).json();
  const rows = found.data.map((task) => {
    const item = document.createElement("li"), question = document.createElement("b"), answer = document.createElement("span"), small = document.createElement("small");
    question.textContent = task.question;
    answer.textContent = task.answer;
    small.textContent = task.evidence ? `${task.kind} · “${task.evidence.length > 300 ? `${task.evidence.slice(0, 299)}…` : task.evidence}”` : task.kind;
    item.append(question, answer, small);
    return item;
  });
  if (offset) $("tasks").append(...rows); else $("tasks").replaceChildren(...rows);
  tasksShown = offset + rows.length;
  $("task-count").textContent = found.total ? `${found.total.toLocaleString("en")} questions it was trained on` : "No tasks. They are written when absorbing begins.";
  $("more-tasks").hidden = tasksShown >= found.total;
}

async function drawCurve() {
  const card = state.open;
  const rows = (await (await call(`/v1/documents/${card.id}/losses`)).json()).data.filter((row) => row.loss !== null);
  if (state.open === null || state.open.id !== card.id) return;  // closed, or another one opened, meanwhile
  const svg = $("curve"), title = $("curve-title");
  svg.replaceChildren(title);
  if (!rows.length) return;
  const width = 640, height = 260, left = 46, right = 12, top = 14, bottom = 32;
  const steps = Math.max(card.job?.steps ?? 0, rows.at(-1).step, 2), most = Math.max(...rows.map((row) => row.loss)), least = Math.min(0, ...rows.map((row) => row.loss));
  const x = (step) => left + (width - left - right) * (step - 1) / (steps - 1);
  const y = (loss) => height - bottom - (height - top - bottom) * (loss - least) / (most - least || 1);
  const draw = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    svg.append(element);
  };
  for (const part of [0, 0.5, 1]) {
    const value = least + (most - least) * part;
    draw("line", { x1: left, x2: width - right, y1: y(value), y2: y(value) });
    draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(1));
  }
  draw("text", { x: left, y: height - 10 }, "step 1");
  draw("text", { x: width - right, y: height - 10, "text-anchor": "end" }, String(steps));
  let mean = rows[0].loss;
  const means = rows.map((row) => ({ step: row.step, loss: (mean = 0.85 * mean + 0.15 * row.loss) }));
  const path = (points) => points.map((row, at) => `${at ? "L" : "M"}${x(row.step).toFixed(1)} ${y(row.loss).toFixed(1)}`).join("");
  draw("path", { class: "dots", d: path(rows) });
  draw("path", { class: "mean", d: path(means) });
  title.textContent = `Loss by training step: from ${rows[0].loss.toFixed(2)} to ${rows.at(-1).loss.toFixed(2)} in ${rows.length} steps`;
  $("curve-text").textContent = `Loss (nats a token), each step and smoothed: ${rows[0].loss.toFixed(2)} at first, ${rows.at(-1).loss.toFixed(2)} now.`;
}

// --- beginning -------------------------------------------------------------------------------------------------------

async function begin() {
  for (;;) {
    const reply = await fetch("/readyz").catch(() => null);
    if (reply && reply.ok) break;
    $("status").textContent = reply ? "The model is being loaded…" : "The server cannot be reached.";
    await new Promise((done) => setTimeout(done, 1000));
  }
  state.base = (await (await call("/v1/models")).json()).data[0].id;
  $("status").textContent = `Ready · ${state.base}`;
  await loadDocuments();
  const wanted = state.documents.find((card) => card.id === location.hash.slice(1));
  if (wanted) await openDocument(wanted);
}

$("upload").addEventListener("submit", guarded(absorb));
$("file").addEventListener("change", showFileName);
const drop = document.querySelector(".drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) {
      $("file").files = event.dataTransfer.files;
      showFileName();
    }
  });
}
const later = (work) => {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(guarded(work), 200); };
};
$("search").addEventListener("input", later(loadDocuments));
$("task-search").addEventListener("input", later(() => loadTasks(0)));
$("more-tasks").addEventListener("click", guarded(() => loadTasks(tasksShown)));
$("ask").addEventListener("submit", guarded(ask));
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => state.asking && state.asking.abort());
$("cancel").addEventListener("click", guarded(async () => show(await (await call(`/v1/documents/${state.open.id}/cancel`, { method: "POST" })).json())));
$("delete").addEventListener("click", guarded(remove));
$("back").addEventListener("click", close);
$("problem").lastElementChild.addEventListener("click", () => { $("problem").hidden = true; });
$("tabs").addEventListener("click", (event) => { if (event.target.role === "tab") chooseTab(event.target.id.slice(4)); });
$("tabs").addEventListener("keydown", (event) => {
  const tabs = [...$("tabs").children].filter((tab) => !tab.disabled), at = tabs.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || at < 0) return;
  const next = tabs[(at + step + tabs.length) % tabs.length];
  next.focus();
  chooseTab(next.id.slice(4));
});
guarded(begin)();
