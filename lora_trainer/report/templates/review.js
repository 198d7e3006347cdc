"use strict";
(() => {
  const { facts, pairs, labels } = JSON.parse(document.getElementById("data").textContent);
  const MARKS = ["nonsense", "unsafe", "not_this_friend"], SIDES = ["first", "second"], CHOICES = ["first", "tie", "second"];
  const KEYS = { KeyQ: ["first", 0], KeyW: ["first", 1], KeyE: ["first", 2], KeyU: ["second", 0], KeyI: ["second", 1], KeyO: ["second", 2] };
  const NUMBERS = { Digit1: 0, Digit2: 1, Digit3: 2, Numpad1: 0, Numpad2: 1, Numpad3: 2 };
  const STORED_AS = ["lora-trainer review", facts.bundle_id, facts.reference.bundle_id ?? "base", facts.seed, facts.count].join(" ");
  const FILE = `review-${facts.blood_type}-${facts.run_id.slice(0, 16)}-${facts.seed}.json`;
  const $ = id => document.getElementById(id);
  const filled = (label, values) => label.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const now = () => new Date().toISOString();

  // --- state, kept in the browser ---

  const empty = () => ({ choice: null, marks: { first: [], second: [] }, note: "" });

  // other pages of the same origin may have written anything, so take only what has the right form
  const restored = text => {
    const found = JSON.parse(text) ?? {}, answers = {};
    for (const { id } of pairs) {
      const answer = found.answers?.[id];
      if (!answer) continue;
      answers[id] = {
        choice: CHOICES.includes(answer.choice) ? answer.choice : null,
        marks: Object.fromEntries(SIDES.map(side => [side, MARKS.filter(mark => answer.marks?.[side]?.includes(mark))])),
        note: String(answer.note ?? "").slice(0, $("note").maxLength),
      };
    }
    const time = value => isNaN(Date.parse(value)) ? null : new Date(value).toISOString();
    return {
      at: Number.isInteger(found.at) ? Math.min(Math.max(found.at, 0), pairs.length) : 0,
      reviewer: String(found.reviewer ?? "").slice(0, $("reviewer").maxLength),
      started_at: time(found.started_at) ?? now(),
      finished_at: pairs.every(({ id }) => answers[id]?.choice) ? time(found.finished_at) : null,
      answers,
    };
  };

  const loaded = () => {
    try {
      return restored(localStorage.getItem(STORED_AS) ?? "{}");
    } catch {
      return restored("{}");
    }
  };

  const save = () => {
    try {
      localStorage.setItem(STORED_AS, JSON.stringify(state));
    } catch {
      $("not-stored").textContent = labels.not_stored;
      $("not-stored").hidden = false;
    }
  };

  const state = loaded();
  const answerOf = pair => state.answers[pair.id] ??= empty();
  const missing = () => pairs.filter(({ id }) => !state.answers[id]?.choice).length;
  const isFinished = () => state.finished_at !== null;

  // --- drawing; texts of the bundle only ever become textContent ---

  const draw = () => {
    const atEnd = state.at >= pairs.length;
    $("ask").hidden = atEnd || isFinished();
    $("end").hidden = !atEnd || isFinished();
    $("result").hidden = !isFinished();
    document.querySelector("nav").hidden = isFinished();
    $("bar").value = pairs.length - missing();
    $("position").textContent = filled(labels.progress, { at: atEnd ? pairs.length - missing() : state.at + 1, count: pairs.length });
    $("back").disabled = state.at === 0;
    $("forward").disabled = atEnd;
    if (isFinished()) drawResult();
    else if (atEnd) drawEnd();
    else drawPair(pairs[state.at]);
  };

  const drawPair = pair => {
    const answer = answerOf(pair);
    for (const name of ["feeling", "summary", "input"]) $(name).textContent = pair[name];
    $("summary").hidden = !pair.summary;
    $("intensity").textContent = pair.intensity;
    $("meter").value = pair.intensity;
    SIDES.forEach((side, at) => {
      const reply = pair.replies[at], card = $(side);
      card.querySelector(".answer").textContent = reply.text || labels.empty;
      card.querySelector(".face").textContent = reply.face;
    });
    for (const button of document.querySelectorAll("[data-mark]"))
      button.setAttribute("aria-pressed", answer.marks[button.dataset.side].includes(button.dataset.mark));
    for (const button of document.querySelectorAll("[data-choice]"))
      button.setAttribute("aria-pressed", answer.choice === button.dataset.choice);
    $("note").value = answer.note;
  };

  const drawEnd = () => {
    const count = missing();
    $("state").textContent = count ? filled(labels.missing, { missing: count }) : labels.answered;
    $("to-missing").hidden = !count;
    $("reviewer").value = state.reviewer;
    $("finish").disabled = count > 0 || !state.reviewer.trim();
  };

  // The key is not in the page: an even number of bits in the pair's id means that the adapter stands first.
  const adapterSide = id => [...id].reduce((bits, digit) => bits + [0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4][parseInt(digit, 16)], 0) % 2;

  const drawResult = () => {
    const count = { wins: 0, ties: 0, losses: 0 }, marked = { adapter: {}, reference: {} };
    const reference = facts.reference.model === "base" ? labels.base : filled(labels.other_adapter, { run: facts.reference.run_id });
    $("revealed").replaceChildren(...pairs.map(pair => {
      const answer = answerOf(pair), own = adapterSide(pair.id), line = document.createElement("li");
      count[answer.choice === "tie" ? "ties" : answer.choice === SIDES[own] ? "wins" : "losses"] += 1;
      const said = document.createElement("p");
      said.className = "soft";
      said.textContent = pair.input;
      line.append(said);
      SIDES.forEach((side, at) => {
        const whose = at === own ? "adapter" : "reference", text = document.createElement("p");
        for (const mark of answer.marks[side]) marked[whose][mark] = (marked[whose][mark] ?? 0) + 1;
        text.className = answer.choice === side ? "chosen" : "";
        text.textContent = `${at === own ? labels.adapter : reference}: ${pair.replies[at].text || labels.empty}`;
        line.append(text);
      });
      return line;
    }));
    for (const name in count) $(name).textContent = count[name];
    for (const whose in marked) for (const mark of MARKS) $(`${whose}-${mark}`).textContent = marked[whose][mark] ?? 0;
    for (const [whose, name] of [["adapter", labels.adapter], ["reference", reference]]) {
      $(`${whose}-head`).textContent = name;
      $(`${whose}-better`).textContent = filled(labels.better, { name });
    }
    $("file").textContent = FILE;
  };

  // --- what the reviewer does ---

  const go = at => {
    state.at = Math.min(Math.max(at, 0), pairs.length);
    save();
    draw();
    scrollTo(0, 0);
  };

  const choose = choice => {
    answerOf(pairs[state.at]).choice = choice;
    document.activeElement?.blur();
    $("help").open = false;
    go(state.at + 1);
  };

  const toggle = (side, mark) => {
    const marks = answerOf(pairs[state.at]).marks, rest = marks[side].filter(other => other !== mark);
    marks[side] = rest.length < marks[side].length ? rest : [...rest, mark];
    save();
    draw();
  };

  const finish = () => {
    if (missing() || !state.reviewer.trim()) return;
    state.finished_at = now();
    save();
    draw();
    scrollTo(0, 0);
    download();
  };

  const download = () => {
    const { reviewer, started_at, finished_at } = state;
    const answers = pairs.map(pair => ({ id: pair.id, ...answerOf(pair) }));
    const content = JSON.stringify({ ...facts, reviewer: reviewer.trim(), started_at, finished_at, answers }, null, 2) + "\n";
    const link = document.createElement("a"), url = URL.createObjectURL(new Blob([content], { type: "application/json" }));
    link.href = url;
    link.download = FILE;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  };

  for (const button of document.querySelectorAll("[data-choice]")) button.onclick = () => choose(button.dataset.choice);
  for (const button of document.querySelectorAll("[data-mark]")) button.onclick = () => toggle(button.dataset.side, button.dataset.mark);
  $("back").onclick = () => go(state.at - 1);
  $("forward").onclick = () => go(state.at + 1);
  $("to-missing").onclick = () => go(pairs.findIndex(({ id }) => !state.answers[id]?.choice));
  $("finish").onclick = finish;
  $("download").onclick = download;
  $("note").oninput = () => { answerOf(pairs[state.at]).note = $("note").value; save(); };
  $("reviewer").oninput = () => { state.reviewer = $("reviewer").value; save(); $("finish").disabled = missing() > 0 || !state.reviewer.trim(); };

  // `code` names the key by its place, which works while a Korean input method is on
  addEventListener("keydown", event => {
    const isTyping = event.target.matches?.("input, textarea");
    if (isTyping) {
      if (event.code === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || isFinished()) return;
    const isAsking = state.at < pairs.length;
    if (event.code === "ArrowLeft") go(state.at - 1);
    else if (event.code === "ArrowRight") go(state.at + 1);
    else if (isAsking && event.code in NUMBERS) choose(CHOICES[NUMBERS[event.code]]);
    else if (isAsking && event.code in KEYS) toggle(KEYS[event.code][0], MARKS[KEYS[event.code][1]]);
    else if (isAsking && event.code === "KeyN") $("note").focus();
    else return;
    event.preventDefault();
  });

  $("help").open = missing() === pairs.length;
  save();
  draw();
})();
