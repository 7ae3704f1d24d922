"""ComfyUI as a server, with this checkout in its custom_nodes, and what can be asked of it over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

ROOT = Path(__file__).resolve().parents[2]
FLUX_NANO = ROOT / "models" / "flux-nano"
# Names that the templates ask for: empty files put them into ComfyUI's lists.
MODEL_FILES = {
    "diffusion_models": ("flux1-dev.safetensors", "flux1-schnell.safetensors"),
    "text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
    "vae": ("ae.safetensors",),
}
CUSTOMIZE = Path(__file__).with_name("customize")


class Server:
    """A ComfyUI that was started, and what can be asked of it."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self.log = address, log

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{quote(path)}", timeout=30) as answer:
            return json.load(answer)

    def run(
        self, prompt: dict[str, Any], *, interrupt_at: int | None = None
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The finished run's outputs, and the lines that were shown on each node while it ran.

        interrupt_at: the step of the sampler at which the page's stop button is pressed; nothing is put out then.
        """
        return asyncio.run(self._run(prompt, interrupt_at))

    def picture(self, outputs: dict[str, Any], node: str) -> bytes:
        """The file that a SaveImage node of a finished run wrote."""
        image = outputs[node]["images"][0]
        query = urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"http://{self.address}/view?{query}", timeout=30) as answer:
            data: bytes = answer.read()
        return data

    async def _run(
        self, prompt: dict[str, Any], interrupt_at: int | None
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        import aiohttp

        client, lines = uuid.uuid4().hex, {}
        root = f"http://{self.address}"
        async with aiohttp.ClientSession(root) as session, session.ws_connect(f"/ws?clientId={client}") as page:
            async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                accepted = await answer.json()
            assert answer.status == 200, accepted
            while True:
                message = await page.receive(timeout=300)
                # A line on a node: 3, the length of its id, its id, the text.
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == b"\x00\x00\x00\x03":
                    length = int.from_bytes(message.data[4:8], "big")
                    node = message.data[8 : 8 + length].decode()
                    lines.setdefault(node, []).append(message.data[8 + length :].decode())
                elif message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    # Not at one step: versions differ in how many of a sampler's steps the page hears of.
                    steps = event["data"]["value"] if event["type"] == "progress" else 0
                    if interrupt_at is not None and steps >= interrupt_at:
                        await (await session.post("/interrupt")).read()
                    if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                        wanted = "execution_success" if interrupt_at is None else "execution_interrupted"
                        assert event["type"] == wanted, event["data"]
                        break
        key = accepted["prompt_id"]
        while key not in (history := self.get(f"/history/{key}")):  # written after the page was told
            await asyncio.sleep(0.1)
        outputs = history[key]["outputs"]
        return outputs, lines


def started(comfyui: Path, base: Path) -> Iterator[Server]:
    """ComfyUI with this checkout in custom_nodes, on a free port, its files in the empty folder `base`."""
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "ComfyUI-Lightning").symlink_to(ROOT)
    for kind, names in MODEL_FILES.items():
        (base / "models" / kind).mkdir(parents=True)
        for name in names:
            (base / "models" / kind / name).touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "log.txt"
    command = [sys.executable, "main.py", "--cpu", "--base-directory", str(base), "--port", str(port),
               "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]  # fmt: skip
    paths = os.pathsep.join([str(CUSTOMIZE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=comfyui, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths}
        )
    running = Server(f"127.0.0.1:{port}", log)
    try:
        for _ in range(2400):  # a loaded machine takes minutes to import it all
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                running.get("/system_stats")
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(f"ComfyUI did not answer in twenty minutes: {log.read_text()[-3000:]}")
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)
