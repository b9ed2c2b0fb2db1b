"""The corpus at a glance: documents, bytes, tokens and licence of each domain."""

from dataclasses import dataclass

from minimoe.train.domains import DOMAINS
from minimoe.train.store import Corpus


@dataclass(frozen=True)
class DomainRow:
    """What one domain brings: documents, bytes and tokens on each side of the split."""

    domain: str
    title: str
    licence: str
    train_documents: int
    train_bytes: int
    train_tokens: int
    heldout_documents: int
    heldout_bytes: int
    heldout_tokens: int
    bytes_per_token: float


def describe(corpus: Corpus) -> list[DomainRow]:
    """One row for each domain of the corpus, in its order."""
    rows: list[DomainRow] = []
    for name in corpus.domains:
        train = corpus.train.documents[corpus.train.document_slice(name)]
        heldout = corpus.heldout.documents[corpus.heldout.document_slice(name)]
        size = sum(d.bytes for d in (*train, *heldout))
        rows.append(
            DomainRow(
                domain=name,
                title=DOMAINS[name].title,
                licence=DOMAINS[name].licence,
                train_documents=len(train),
                train_bytes=sum(d.bytes for d in train),
                train_tokens=sum(d.tokens for d in train),
                heldout_documents=len(heldout),
                heldout_bytes=sum(d.bytes for d in heldout),
                heldout_tokens=sum(d.tokens for d in heldout),
                bytes_per_token=size / max(1, sum(d.tokens for d in (*train, *heldout))),
            )
        )
    return rows


def _cells(row: DomainRow) -> tuple[str, ...]:
    return (
        row.domain,
        row.title,
        f"{row.train_documents:,}",
        f"{row.heldout_documents:,}",
        f"{(row.train_bytes + row.heldout_bytes) / 1e6:.2f}",
        f"{row.train_tokens:,}",
        f"{row.heldout_tokens:,}",
        f"{row.bytes_per_token:.2f}",
        row.licence,
    )


def table(corpus: Corpus) -> str:
    """The rows of `describe` as aligned text, with a total and a line for each domain that was skipped."""
    head = (
        *("domain", "title", "documents", "held out", "MB", "tokens", "held out"),
        *("bytes/token", "licence"),
    )
    rows = describe(corpus)
    total = DomainRow(
        domain="all",
        title="",
        licence="",
        train_documents=sum(r.train_documents for r in rows),
        train_bytes=sum(r.train_bytes for r in rows),
        train_tokens=sum(r.train_tokens for r in rows),
        heldout_documents=sum(r.heldout_documents for r in rows),
        heldout_bytes=sum(r.heldout_bytes for r in rows),
        heldout_tokens=sum(r.heldout_tokens for r in rows),
        bytes_per_token=sum(r.train_bytes + r.heldout_bytes for r in rows)
        / max(1, sum(r.train_tokens + r.heldout_tokens for r in rows)),
    )
    lines = [head, *(_cells(row) for row in (*rows, total))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    left = {0, 1, len(head) - 1}
    text = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text += [f"skipped {name}: {reason}" for name, reason in corpus.skipped.items()]
    return "\n".join(text)
