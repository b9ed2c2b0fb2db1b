// Scores of search results. Sphinx takes this in place of its own; the numbers are its own but for `score`: whoever looks
// for a word wants the lesson that explains it first, and the objects and modules of the library last.
var Scorer = {
  score: ([docname, title, anchor, descr, score]) =>
    score + (docname.startsWith("notebooks/") ? 1000 : docname.startsWith("book/api/") ? -1000 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
