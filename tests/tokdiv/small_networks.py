"""Small timm networks with weights drawn anew, checkpoints of them, and a server on the loopback interface."""

import hashlib
import http.server
import threading
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from tokdiv import Teacher, TeacherSpec, load_teacher

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(architecture: str, **arguments: Any) -> torch.nn.Module:
    """With weights and statistics drawn anew, so that every tensor matters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model(architecture, **arguments)
    generator = torch.Generator().manual_seed(1)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() if key.endswith("running_var") else noise, alpha=0.05)
    return model.eval()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student beside the teacher: the same keys, other values."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in tensors.items()}


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def bare_tokens(model: torch.nn.Module, images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        features = model.forward_features((images / 255 - mean) / std)
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, model.num_prefix_tokens :]


def load(architecture: str, path: Path, **fields: Any) -> Teacher:
    spec = TeacherSpec(
        "t",
        architecture,
        weights=str(path),
        **({"size": 64, "mean": MEAN, "std": STD} | fields),
    )
    return load_teacher(spec)


class Server:
    """Files on the loopback interface; `requests` are the GETs so far, `gate` holds half of a body back."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.cut: int | None = None  # bytes after which the connection is closed
        self.chunked = False
        self.length: str | None = ""  # Content-Length: "" is the true one, None leaves it out
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                content = content or b""
                if outer.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                elif outer.length is not None:
                    self.send_header("Content-Length", outer.length or str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "c" * 40)
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                if not body:
                    return
                sent = content[: outer.cut]
                sent = b"%x\r\n" % len(content) + sent if outer.chunked else sent
                half = len(sent) // 2
                self.wfile.write(sent[:half])
                outer.gate.wait(60)
                self.wfile.write(sent[half:])

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.address}/w.pth"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()
