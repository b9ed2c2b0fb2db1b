// The shipped model's byte-level BPE: text -> tokens, as the library `tokenizers` cuts it.

// The smallest number first.
class Heap {
  constructor() {
    this.items = [];
  }

  push(item) {
    const items = this.items;
    let i = items.push(item) - 1;
    while (i > 0 && items[(i - 1) >> 1] > item) {
      items[i] = items[(i - 1) >> 1];
      i = (i - 1) >> 1;
    }
    items[i] = item;
  }

  pop() {
    const items = this.items;
    const [first, item] = [items[0], items.pop()];
    if (!items.length) return first;
    let i = 0;
    for (let child = 1; child < items.length; child = 2 * i + 1) {
      if (items[child + 1] < items[child]) child += 1;
      if (items[child] >= item) break;
      items[i] = items[child];
      i = child;
    }
    items[i] = item;
    return first;
  }
}

export class Tokenizer {
  // From the tables of export.py, `tokenizer.bytes` and so on, by name. What counts as a letter comes from there and not
  // from the browser, whose Unicode may be newer.
  constructor(tensors) {
    const [bytes, merges, letters, numbers, spaces] =
      ["bytes", "merges", "letters", "numbers", "spaces"].map((name) => tensors[`tokenizer.${name}`]);
    this.bytes = bytes;
    this.first = 257; // what the first pair merges into; before it are end-of-text and the bytes
    this.size = this.first + merges.length / 2;
    this.rank = new Map();
    this.spelling = [[]]; // the bytes of each token; end-of-text has none
    bytes.forEach((token, byte) => (this.spelling[token] = [byte]));
    for (let i = 0; i < merges.length; i += 2) {
      this.rank.set(merges[i] * this.size + merges[i + 1], i / 2);
      this.spelling.push([...this.spelling[merges[i]], ...this.spelling[merges[i + 1]]]);
    }
    const hex = (code) => `\\u{${code.toString(16)}}`;
    const set = (runs) => Array.from({ length: runs.length / 2 }, (_, i) => `${hex(runs[2 * i])}-${hex(runs[2 * i + 1])}`).join("");
    const [L, N, S] = [letters, numbers, spaces].map(set);
    const words = `'s|'t|'re|'ve|'m|'ll|'d| ?[${L}]+| ?[${N}]+| ?[^${S}${L}${N}]+|[${S}]+(?![^${S}])|[${S}]+`;
    this.words = new RegExp(words, "gu");
    this.encoder = new TextEncoder();
  }

  // text -> tokens, the first `limit` of them; a text beyond that is not looked at. Half of a surrogate pair, which is
  // no character, is read as U+FFFD, which is also what it becomes where the text is sent or stored as UTF-8.
  encode(text, limit = Infinity) {
    const tokens = [];
    for (const [word] of text.replace(/[\ud800-\udfff]/gu, "\ufffd").matchAll(this.words)) {
      for (const token of this.merge(this.encoder.encode(word))) {
        if (tokens.length >= limit) return tokens;
        tokens.push(token);
      }
    }
    return tokens;
  }

  // The tokens of one word's bytes: of all neighbours that form a pair, the one that was learnt first merges first.
  merge(word) {
    const n = word.length;
    const tokens = Array.from(word, (byte) => this.bytes[byte]);
    const next = tokens.map((_, i) => i + 1); // n: there is none
    const before = tokens.map((_, i) => i - 1);
    const heap = new Heap();
    const rank = (i) => (next[i] < n ? this.rank.get(tokens[i] * this.size + tokens[next[i]]) : undefined);
    const offer = (i) => {
      const r = i < 0 ? undefined : rank(i);
      if (r !== undefined) heap.push(r * 2 ** 32 + i); // by rank, then from left to right
    };
    for (let i = 0; i < n; i += 1) offer(i);
    while (heap.items.length) {
      const item = heap.pop();
      const i = item % 2 ** 32;
      const r = (item - i) / 2 ** 32;
      if (tokens[i] < 0 || rank(i) !== r) continue; // one of the two has merged since
      const gone = next[i];
      tokens[i] = this.first + r;
      tokens[gone] = -1;
      next[i] = next[gone];
      if (next[i] < n) before[next[i]] = i;
      offer(before[i]);
      offer(i);
    }
    return tokens.filter((token) => token >= 0);
  }
}

// How a token is written so that each of its bytes can be seen: characters as they are, a blank as ␣, line ends and tabs
// as ↵ and ⇥, other control and invisible characters as ⟨U+200B⟩, bytes that are only a part of one as ⟨E2⟩, and an accent without
// its letter on ◌.
export function written(bytes) {
  const invisible = /[\p{C}\p{Z}\p{Default_Ignorable_Code_Point}]/u;
  const named = { " ": "␣", "\n": "↵", "\t": "⇥" };
  const hex = (number, digits) => number.toString(16).toUpperCase().padStart(digits, "0");
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let text = "";
  for (let i = 0; i < bytes.length; ) {
    const length = bytes[i] < 0x80 ? 1 : bytes[i] < 0xe0 ? 2 : bytes[i] < 0xf0 ? 3 : 4;
    let character;
    try {
      character = decoder.decode(new Uint8Array(bytes.slice(i, i + length)));
    } catch {
      text += `⟨${hex(bytes[i], 2)}⟩`;
      i += 1;
      continue;
    }
    text += named[character] ?? (invisible.test(character) ? `⟨U+${hex(character.codePointAt(0), 4)}⟩` : character);
    i += length;
  }
  return /^\p{M}/u.test(text) ? `◌${text}` : text;
}
