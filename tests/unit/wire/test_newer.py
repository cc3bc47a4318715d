# A peer of a newer wire version: neither side guesses, and both say what is the matter.
from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from idunno.base.errors import IdunnoError
from idunno.wire.frames import HEAD_BYTES
from idunno.wire.rpc import Server, connect_unix

NEWER = struct.pack(">2sBBIII", b"iD", 2, 8, 0, 0, 0)
"""The head of a frame of wire version 2, whatever that will be."""


def test_who_asks_a_newer_node_is_told_both_versions(tmp_path: Path) -> None:
    async def work() -> None:
        async def newer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(NEWER)
            await writer.drain()
            await reader.read(HEAD_BYTES)

        path = str(tmp_path / "newer.sock")
        async with await asyncio.start_unix_server(newer, path):
            with pytest.raises(IdunnoError, match="wire version 2, this one 1: run the same release"):
                await connect_unix(path, timeout_s=5.0)

    asyncio.run(work())


def test_a_newer_peer_that_asks_is_answered_with_the_reason_and_cut(tmp_path: Path) -> None:
    async def work() -> None:
        server = Server(lambda fingerprint: None, name="old")
        path = str(tmp_path / "old.sock")
        await server.listen_unix(path)
        try:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(NEWER)
            said = await asyncio.wait_for(reader.read(), 5.0)  # to the end: it is cut
            writer.close()
            assert b"malformed" in said
            assert b"wire version 2, this one 1: run the same release" in said
        finally:
            await server.close(grace_s=0.1)

    asyncio.run(work())
