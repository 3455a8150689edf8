// A section matches if each typed word is a prefix of one of its words. Matches in title or heading come first.
const sections = JSON.parse(document.getElementById("search-index").textContent);
const box = document.getElementById("words");
const hits = document.querySelector(".hits");
document.documentElement.classList.add("scripted");
box.form.addEventListener("submit", (event) => event.preventDefault());
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/[^\p{L}\p{N}.]+/u).filter((word) => word.length > 1);
  const begins = (text, word) => (" " + text.toLowerCase().replace(/[^\p{L}\p{N}.]+/gu, " ")).indexOf(" " + word);
  const found = [];
  for (const [file, title, anchor, heading, text] of words.length ? sections : []) {
    const head = title + " " + heading;
    if (!words.every((word) => begins(head + " " + text, word) >= 0)) continue;
    found.push({ file, title, anchor, heading, text, weight: words.filter((word) => begins(head, word) >= 0).length });
  }
  found.sort((a, b) => b.weight - a.weight);
  hits.replaceChildren(...found.slice(0, 20).map((hit) => {
    const item = document.createElement("li"), link = document.createElement("a"), near = document.createElement("small");
    link.href = hit.file + "#" + hit.anchor;
    link.textContent = hit.heading && hit.heading !== hit.title ? hit.title + ": " + hit.heading : hit.title;
    const at = Math.max(0, hit.text.toLowerCase().indexOf(words[0]) - 60);
    near.textContent = (at ? "\u2026" : "") + hit.text.slice(at, at + 180);
    item.append(link, near);
    return item;
  }));
  if (words.length && !found.length) hits.textContent = "No page has all of these words.";
});
