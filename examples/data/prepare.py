#!/usr/bin/env python3
"""Makes digits.csv and breast_cancer.csv from the copies that scikit-learn's wheel contains.

    pip download scikit-learn==1.9.1 --no-deps
    python prepare.py scikit_learn-1.9.1-*.whl

Only the layout changes: a header line is added, and the breast cancer diagnosis becomes `malignant`
(1 = malignant, 0 = benign), where scikit-learn stores 0 for malignant. No number is altered.
Needs nothing beyond Python's standard library.
"""

import csv
import gzip
import hashlib
import io
import pathlib
import sys
import zipfile

HERE = pathlib.Path(__file__).parent
SOURCES = {
    "digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
    "breast_cancer.csv": "fed3eb72d0575ef6192293f5093c6e801b1476b577d0386bf4455504522172ed",
}
MEASURES = [
    "radius",
    "texture",
    "perimeter",
    "area",
    "smoothness",
    "compactness",
    "concavity",
    "concave_points",
    "symmetry",
    "fractal_dimension",
]


def source(wheel, name):
    content = wheel.read(f"sklearn/datasets/data/{name}")
    found = hashlib.sha256(content).hexdigest()
    if found != SOURCES[name]:
        sys.exit(f"{name}: its SHA-256 is {found}, expected {SOURCES[name]}")
    return content


def write(name, header, rows):
    with open(HERE / name, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    print(f"{name}: {len(rows)} rows of {len(header)} columns")


def digits(wheel):
    text = gzip.decompress(source(wheel, "digits.csv.gz")).decode()
    rows = list(csv.reader(io.StringIO(text)))
    header = [f"r{row}c{column}" for row in range(8) for column in range(8)] + ["digit"]
    write("digits.csv", header, rows)


def breast_cancer(wheel):
    text = source(wheel, "breast_cancer.csv").decode()
    rows = list(csv.reader(io.StringIO(text)))[1:]  # the first line counts rows and columns
    rows = [row[:-1] + [{"0": "1", "1": "0"}[row[-1]]] for row in rows]
    header = [f"{measure}_{kind}" for kind in ("mean", "error", "worst") for measure in MEASURES]
    write("breast_cancer.csv", header + ["malignant"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        digits(wheel)
        breast_cancer(wheel)
