"""Split documents into training and validation, whole documents only."""

from megatree.io.data.documents import Documents
from megatree.io.data.order import sample_ids


def split_documents(
    documents: Documents, *, valid_fraction: float, seed: int
) -> tuple[Documents, Documents]:
    """Return (train, valid): a drawn share of the documents is held out, both in stored order.

    The draw is a function of `seed` and the number of documents. Each side that is asked for gets
    at least one document.

    Args:
        documents: what to split.
        valid_fraction: share of the documents, in [0, 1]; 0 holds nothing out.
        seed: picks the documents.

    Raises:
        ValueError: if the fraction is not a share, or one side would be empty.
    """
    total = len(documents)
    if not 0 <= valid_fraction <= 1:
        raise ValueError(
            f"split_documents: valid_fraction {valid_fraction} is not a share. Use one in [0, 1]."
        )
    num_valid = round(valid_fraction * total)
    if 0 < valid_fraction < 1:
        if total < 2:
            raise ValueError(
                f"split_documents: {total} document(s) cannot fill both sides. "
                "Add documents, or set valid_fraction to 0."
            )
        num_valid = min(max(num_valid, 1), total - 1)
    held_out = set(sample_ids(range(num_valid), total, seed=seed).tolist()) if total else set()
    valid = [document for document in range(total) if document in held_out]
    train = [document for document in range(total) if document not in held_out]
    return documents.select(train), documents.select(valid)
