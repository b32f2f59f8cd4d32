"""The data pipeline's arithmetic, letter by letter and residue by residue, from the formats' and AlphaFold3's text."""

import math

PROTEIN = "ARNDCQEGHILKMFPSTWYV"


def a3m(text):
    """Names, rows and deletions of an alignment: lower-case letters count for the column that follows them."""
    names, rows, deletions = [], [], []
    for record in text.split(">")[1:]:
        name, _, body = record.partition("\n")
        row, counts, waiting = "", [], 0
        for letter in body:
            if letter.isspace():
                continue
            if letter.islower():
                waiting += 1
            else:
                row += letter
                counts.append(waiting)
                waiting = 0
        names.append(name.strip())
        rows.append(row)
        deletions.append(counts)
    return names, rows, deletions


def profile(rows, column):
    """Frequencies of the 32 types (20 amino acids, unknown, ten nucleotides, gap) in a column of proteins."""
    counts = [0.0] * 32
    for row in rows:
        letter = {"B": "D", "U": "C", "Z": "E"}.get(row[column], row[column])
        counts[31 if letter == "-" else PROTEIN.index(letter) if letter in PROTEIN else 20] += 1 / len(rows)
    return counts


def deletion_value(count):
    """AlphaFold3, supplement, table 5."""
    return 2 / math.pi * math.atan(count / 3)
