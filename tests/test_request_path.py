"""One question runs code of at most 30 files of the package, from the request to the answer."""

import asyncio
import sys
import threading
from contextlib import closing
from pathlib import Path

import httpx

import gog_edge
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.runtime import open_runtime
from gog_edge.serve.app import create_app

PACKAGE = Path(gog_edge.__file__).parent
QUESTION = "What is the capital of the country of the second flag from the left?"
MAX_FILES = 30


class FileRecorder:
    """A profile function that records the files of the package whose functions are called while it is active."""

    def __init__(self):
        self.active = False
        self.files = set()

    def __call__(self, frame, event, arg):
        if self.active and event == "call":
            self.files.add(frame.f_code.co_filename)

    @property
    def package_files(self):
        paths = map(Path, self.files)
        return sorted(str(path.relative_to(PACKAGE)) for path in paths if path.is_relative_to(PACKAGE))


async def ask(app, recorder):
    """The answer to a question in a real request to the application; only this is recorded."""
    picture = (DEFAULT_BUNDLE / "samples" / "row.jpg").read_bytes()
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
            recorder.active = True
            response = await client.post("/v1/ask", files={"picture": picture}, data={"question": QUESTION})
            recorder.active = False
    assert response.status_code == 200, response.text
    return response.json()


def test_a_question_crosses_few_files():
    recorder = FileRecorder()
    threading.setprofile(recorder)  # before any thread of the runtime or the server is started
    sys.setprofile(recorder)
    try:
        with closing(open_runtime(DEFAULT_BUNDLE, threads=1)) as runtime:
            runtime.warm_up()
            answer = asyncio.run(ask(create_app(runtime), recorder))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert answer["answer"] == "Helsinki" and answer["citations"]
    assert [step["action"] for step in answer["steps"]] == ["gaze_search", "answer"]
    files = recorder.package_files
    assert {"serve/app.py", "policy/session.py", "retrieval/retriever.py"} <= set(files)  # of different threads
    assert len(files) <= MAX_FILES, f"{len(files)} files:\n" + "\n".join(files)
