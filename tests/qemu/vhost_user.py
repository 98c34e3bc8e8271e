# SPDX-License-Identifier: MIT OR Apache-2.0
"""A vhost-user back end with only the messages that QEMU needs to create the device. It transfers no data."""

import os
import socket
import struct
import threading

GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG, GET_MAX_MEM_SLOTS = 1, 15, 17, 24, 36
VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30
PROTOCOL_PAGEFAULT = 1 << 8
PROTOCOL_SLAVE_REQ = 1 << 5
PROTOCOL_REPLY_ACK = 1 << 3
NEED_REPLY = 1 << 3


class VhostUser:
    def __init__(self, directory):
        self.path = os.path.join(directory, "vhost-user")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()
        os.unlink(self.path)

    def _serve(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with peer:
                self._talk(peer)

    @staticmethod
    def _talk(peer):
        answers = {
            GET_FEATURES: VERSION_1 | PROTOCOL_FEATURES,
            GET_PROTOCOL_FEATURES: PROTOCOL_PAGEFAULT | PROTOCOL_SLAVE_REQ | PROTOCOL_REPLY_ACK,
            GET_QUEUE_NUM: 1,
            GET_MAX_MEM_SLOTS: 8,
        }
        try:
            while True:
                header, ancillary, _, _ = peer.recvmsg(12, 1024)
                if len(header) < 12:
                    return
                for level, kind, data in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        for (fd,) in struct.iter_unpack("i", data):
                            os.close(fd)
                request, flags, size = struct.unpack("<III", header)
                while size:
                    size -= len(peer.recv(size))
                if request in answers:
                    peer.sendall(struct.pack("<IIIQ", request, 1 | 1 << 2, 8, answers[request]))
                elif flags & NEED_REPLY:
                    peer.sendall(struct.pack("<IIIQ", request, 1 | 1 << 2, 8, 0))
        except OSError:
            return
