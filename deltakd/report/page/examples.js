// The examples: every prompt with its reference and what each model answered. All of it enters as text.

const PAGE = 10; // prompts that one click shows
const MOST_WORDS = 300; // of a text whose differences are marked; longer ones are shown plain

function wordsNotIn(text, reference) {
  // Marks the words of `text` that a longest common subsequence with `reference` leaves out.
  const [a, b] = [text.split(/(\s+)/), reference.split(/\s+/)];
  const words = a.filter((_, index) => index % 2 === 0);
  if (words.length > MOST_WORDS || b.length > MOST_WORDS) return a.map((part) => [part, false]);
  const best = Array.from({ length: words.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = words.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      best[i][j] = words[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  let j = 0;
  return a.map((part, index) => {
    if (index % 2 === 1) return [part, false];
    const i = index / 2;
    while (j < b.length && words[i] !== b[j] && best[i][j + 1] >= best[i + 1][j]) j++;
    if (j < b.length && words[i] === b[j]) return j++, [part, false];
    return [part, true];
  });
}

function said(text, reference, filter) {
  const block = make("p", "said");
  for (const [part, isOther] of reference === null ? [[text, false]] : wordsNotIn(text, reference)) {
    const at = filter ? part.toLowerCase().indexOf(filter) : -1;
    const node = isOther && part ? make("ins") : document.createDocumentFragment();
    if (at < 0) node.append(part);
    else node.append(part.slice(0, at), make("mark", "", part.slice(at, at + filter.length)), part.slice(at + filter.length));
    block.append(node);
  }
  return block;
}

function scoresOf(scores) {
  const list = make("span", "scores");
  for (const [name, short] of [["rougeL", "R-L"], ["answer_correct", ""], ["cross_entropy", "CE"], ["kl_to_teacher", "KL"], ["num_tokens", "tokens"], ["ended", ""]]) {
    const value = scores[name];
    if (value === undefined || value === null || (name === "ended" && value)) continue;
    const item = make("span");
    const label = make("abbr", "", short);
    label.title = data.titles[name] ?? name;
    if (name === "ended") item.textContent = "cut off";
    else if (name === "answer_correct") item.textContent = value ? "✓ correct" : "✗ wrong";
    else if (name === "num_tokens") item.append(`${value} `, label);
    else item.append(label, ` ${data.shares.includes(name) ? (100 * value).toFixed(1) : value.toFixed(3)}`);
    list.append(item);
  }
  return list;
}

function exampleOf(example, models, chosen, filter) {
  const card = make("article", "example");
  const asked = make("div", "asked");
  for (const role of ["prompt", "reference"]) {
    const part = make("div");
    part.append(make("p", "role", role), said(example[role], null, filter));
    asked.append(part);
  }
  const answers = make("div", "answers");
  models.forEach(({ label, run }, index) => {
    const answer = example.answers[index];
    if (!answer || !chosen.has(index)) return;
    const part = make("div");
    const role = make("p", "role");
    const swatch = make("i", run === null ? "swatch nobody" : "swatch");
    if (run !== null) dye(swatch, run);
    role.append(swatch, label, scoresOf(answer.scores));
    part.append(role, said(answer.text, example.reference, filter));
    answers.append(part);
  });
  card.append(asked, answers);
  return card;
}

function setUpExamples(box, { models, rows, num_prompts }) {
  const [list, count, more] = [".list", ".count", ".more"].map((name) => box.querySelector(name));
  const [filter, order] = [box.querySelector(".filter"), box.querySelector(".order")];
  const chosen = new Set(models.keys());
  const texts = rows.map((row) => [row.prompt, row.reference, ...Object.values(row.answers).map((one) => one.text)].join("\n").toLowerCase());
  let [hits, num] = [[], PAGE];

  const scoresIn = (row) => Object.entries(row.answers).filter(([index]) => chosen.has(+index)).map(([, one]) => one.scores.rougeL ?? 0);
  const ranks = {
    spread: (row) => Math.min(...scoresIn(row)) - Math.max(...scoresIn(row)),
    worst: (row) => scoresIn(row).reduce((sum, score) => sum + score, 0) / Math.max(1, scoresIn(row).length),
  };
  function show() {
    const words = filter.value.trim().toLowerCase();
    list.replaceChildren(...hits.slice(0, num).map((row) => exampleOf(row, models, chosen, words)));
    more.hidden = hits.length <= num;
    const left = num_prompts > rows.length ? `; ${num_prompts - rows.length} more prompts do not fit this page` : "";
    count.textContent = `${hits.length} of ${rows.length} prompts${left}`;
  }
  function search() {
    const words = filter.value.trim().toLowerCase();
    hits = rows.filter((_, index) => texts[index].includes(words));
    const rank = ranks[order.value];
    if (rank) hits = hits.map((row) => [rank(row), row]).sort((a, b) => a[0] - b[0]).map(([, row]) => row);
    num = PAGE;
    show();
  }
  box.querySelector(".models").append(...models.map(({ label, run }, index) => {
    const button = chip(label, run);
    button.addEventListener("click", () => {
      if (!chosen.delete(index)) chosen.add(index);
      button.setAttribute("aria-pressed", chosen.has(index));
      search();
    });
    return button;
  }));
  filter.addEventListener("input", search);
  order.addEventListener("change", search);
  more.addEventListener("click", () => { num += PAGE; show(); });
  search();
}

for (const box of all("[data-examples]")) {
  const examples = data.examples[box.dataset.examples];
  if (examples.rows.length) setUpExamples(box, examples);
}
