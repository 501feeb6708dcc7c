"""A device's word on its own ledger, signed with the key by which the server knows it (ECDSA, P-384, SHA-384).

What is signed: which experiment, client, round and task the word belongs to, and epsilon, delta and the ledger's last
row. It shows who said so, not that it is true. Signatures are deterministic (RFC 6979): the same word is signed to the
same bytes, so a reply that is sent again is the reply that was sent, and its length tells nothing.
"""

import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from fedlr.errors import InputError
from fedlr.flower.node_key import load_public_key

SIGNED = ("experiment_id", "client_id", "round_index", "task_sha256", "epsilon", "delta", "ledger_head")
PURPOSE = "fedlr: what my privacy ledger says, 1"  # so that no other signature of the key can be taken for one of these
ROUNDING = 1e-3  # relative, of epsilon: an accountant's grid may round another number of steps otherwise
HALF = 48  # bytes of each of the two numbers


def sign(facts: Mapping[str, Any], key: ec.EllipticCurvePrivateKey) -> str:
    """Return the signature of a word, 192 hexadecimal digits.

    >>> from cryptography.hazmat.primitives.asymmetric import ec
    >>> len(sign(dict.fromkeys(SIGNED), ec.generate_private_key(ec.SECP384R1())))
    192
    """
    pair = decode_dss_signature(key.sign(_text(facts), ec.ECDSA(SHA384(), deterministic_signing=True)))
    return "".join(number.to_bytes(HALF).hex() for number in pair)


def is_signed(facts: Mapping[str, Any], signature: str, public_key: str) -> bool:
    """Return whether the signature is this key's, of exactly this word; `public_key` is the line of a .pub file."""
    try:
        raw = bytes.fromhex(signature)
        pair = int.from_bytes(raw[:HALF]), int.from_bytes(raw[HALF:])
        load_public_key(public_key).verify(encode_dss_signature(*pair), _text(facts), ec.ECDSA(SHA384()))
    except (InvalidSignature, InputError, ValueError, KeyError, TypeError):
        return False
    return len(raw) == 2 * HALF


def _text(facts: Mapping[str, Any]) -> bytes:
    told = {key: facts[key] for key in SIGNED}
    return json.dumps({"purpose": PURPOSE, **told}, sort_keys=True, separators=(",", ":")).encode()
