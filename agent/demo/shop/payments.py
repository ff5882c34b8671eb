"""The payment provider: somebody else's service, which the shop calls and can neither see into nor restart.

Run as `python -m agent.demo.shop.payments --port N [--tls-port N --certificate FILE]`. As in test systems of many, its
own staff set how slowly it answers (`PUT /sandbox/delay`), which share of the payments it fails
(`PUT /sandbox/failing`) and which certificate it shows (`PUT /sandbox/certificate`). As such interfaces do, it refuses
requests whose signature is older or newer than `MAX_SKEW_SECONDS`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import ssl
import time

from aiohttp import web

from agent.demo.shop.metrics import application, listening, until_terminated

USUAL_SECONDS = 0.008
MAX_SKEW_SECONDS = 60.0


class Provider:
    """Authorises every payment after a moment, which is `delay` seconds longer while its staff want it so."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.delay = 0.0
        self.failing = 0.0

    async def authorise(self, request: web.Request) -> web.Response:
        order = await request.json()
        if abs(time.time() - order.get("signed_at", time.time())) > MAX_SKEW_SECONDS:
            return web.json_response({"error": "the request's time is too far from ours"}, status=403)
        await asyncio.sleep(USUAL_SECONDS + self.delay * random.uniform(0.9, 1.3))  # noqa: S311 - a delay, no secret
        if random.random() < self.failing:  # noqa: S311 - a fault, no secret
            return web.json_response({"error": "try again later"}, status=500)
        return web.json_response({"authorised": True, "amount": order["amount"]})

    async def set_delay(self, request: web.Request) -> web.Response:
        self.delay = float((await request.json())["seconds"])
        return web.json_response({"seconds": self.delay})

    async def set_failing(self, request: web.Request) -> web.Response:
        self.failing = float((await request.json())["share"])
        return web.json_response({"share": self.failing})

    async def set_certificate(self, request: web.Request) -> web.Response:
        """What is shown from the next connection on. `file` holds certificate and key (PEM)."""
        if self._tls is None:
            raise web.HTTPConflict(text="no TLS here")
        file = str((await request.json())["file"])
        self._tls.load_cert_chain(file)
        return web.json_response({"file": file})


async def serve(port: int, tls_port: int, certificate: str) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls_port else None
    if tls is not None:
        tls.load_cert_chain(certificate)
    provider, app = Provider(tls), application()
    app.router.add_post("/authorise", provider.authorise)
    app.router.add_put("/sandbox/delay", provider.set_delay)
    app.router.add_put("/sandbox/failing", provider.set_failing)
    app.router.add_put("/sandbox/certificate", provider.set_certificate)
    async with listening(app, port, tls_port, tls):
        await until_terminated()


def main() -> None:
    parser = argparse.ArgumentParser(description="the payment provider")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tls-port", type=int, default=0, help="where it answers over TLS; 0: nowhere")
    parser.add_argument("--certificate", default="", help="certificate and key (PEM), with --tls-port")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.tls_port, args.certificate))


if __name__ == "__main__":
    main()
