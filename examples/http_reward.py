"""A black box behind an address: scores a picture by its mean brightness. Start it, then point a run at it.

python examples/http_reward.py
tiltopt run --config config/ucb.py:demo --config.reward.name=http --config.reward.url=http://127.0.0.1:8765/score
"""

import base64
import io

import uvicorn
from PIL import Image, ImageStat
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def score(request: Request) -> JSONResponse:
    """The schema of docs/rewards.md: items in, answers out."""
    answers = []
    for item in (await request.json())["items"]:
        image = Image.open(io.BytesIO(base64.b64decode(item["image"]["base64"])))
        answers.append({"id": item["id"], "value": ImageStat.Stat(image.convert("L")).mean[0]})
    return JSONResponse({"answers": answers})


app = Starlette(routes=[Route("/score", score, methods=["POST"])])

if __name__ == "__main__":
    print("scores POST http://127.0.0.1:8765/score until it is interrupted", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=8765, log_level="warning")
