"""`fedlr client key`: the key pair by which the server knows this device."""

import socket
from pathlib import Path

from fedlr.flower.node_key import create_node_key
from fedlr.runs.commands import Options, command


@command
def key(arguments: list[str]) -> None:
    """Make this device's key pair: fedlr client key --out FILE [--comment TEXT]

    FILE is the private key (mode 0600) and stays here; FILE.pub, one line of text, goes to the operator.
    Without --comment the line ends in this machine's name. An existing key is never overwritten.
    """
    options = Options()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--comment", default=socket.gethostname())
    chosen = options.parse_args(arguments)
    public_path = create_node_key(chosen.out, comment=chosen.comment)
    print(f"private key in {chosen.out}: keep it here, and readable by the client's user only")
    print(f"public key in {public_path}: give this line to the operator\n{public_path.read_text().strip()}")
