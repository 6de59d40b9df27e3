"""A fake Cloud Storage server: the part of the JSON API that tensorstore, gcsfs and Google's own
client use, with generations and preconditions. A bucket exists as soon as something is written to
it, except the bucket `missing`.
"""

import http.server
import json
import re
import sys
import threading
import urllib.parse
import zlib


class Buckets:
    """The objects: (bucket, name) -> (bytes, generation). Thread-safe."""

    def __init__(self):
        self.objects, self.uploads, self.generation = {}, {}, 0
        self.lock = threading.Lock()

    def write(self, bucket, name, data, query):
        with self.lock:
            self._check(bucket, name, query)
            self.generation += 1
            self.objects[bucket, name] = data, self.generation
            return self.about(bucket, name)

    def read(self, bucket, name, query):
        with self.lock:
            self._check(bucket, name, query)
            return self.objects[bucket, name]

    def delete(self, bucket, name, query):
        with self.lock:
            self._check(bucket, name, query)
            del self.objects[bucket, name]

    def names(self, bucket):
        with self.lock:
            return sorted(name for owner, name in self.objects if owner == bucket)

    def about(self, bucket, name):
        data, generation = self.objects[bucket, name]
        crc = zlib.crc32(data)  # Cloud Storage uses another checksum, but no client compares it
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "etag": str(crc),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _check(self, bucket, name, query):
        """Raises Refused if a precondition fails, and KeyError for the bucket `missing`."""
        if bucket == "missing":
            raise KeyError(bucket)
        now = self.objects.get((bucket, name), (b"", 0))[1]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            raise Refused(412)
        if now and int(query.get("ifGenerationNotMatch", -1)) == now:
            raise Refused(304)


class Refused(Exception):
    """A precondition failed. The argument is the HTTP status."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    buckets: Buckets

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    def do_PUT(self):
        self._answer(self._put)

    def do_DELETE(self):
        self._answer(self._delete)

    def log_message(self, *_):
        pass

    def _answer(self, method):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        path = re.sub("^(/upload|/download)?/storage/v1|^/upload", "", url.path)
        found = re.fullmatch("/b/([^/]+)(?:/o(?:/(.+?))?)?", path)
        self.bucket, name = found.groups() if found else ("", None)
        self.name = urllib.parse.unquote(name) if name else self.query.get("name", "")
        self.body = self._body()
        try:
            method()
        except Refused as error:
            self._send(error.args[0], b"" if error.args[0] == 304 else b"{}")
        except KeyError:
            self._send(404, b'{"error": {"code": 404, "message": "Not Found"}}')

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _json(self, value, status=200, **headers):
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _get(self):
        if not self.name:
            return self._list() if "/o" in self.path else self._json({"name": self.bucket})
        data, generation = self.buckets.read(self.bucket, self.name, self.query)
        if self.query.get("alt") != "media":
            return self._json(self.buckets.about(self.bucket, self.name))
        generation_headers = {"x_goog_generation": str(generation), "ETag": f'"{generation}"'}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, data, **generation_headers)
        first, last = wanted.groups()
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(len(data), int(last) + 1) if first and last else len(data)
        if begin >= end:
            return self._send(416, b"", Content_Range=f"bytes */{len(data)}", **generation_headers)
        content_range = f"bytes {begin}-{end - 1}/{len(data)}"
        return self._send(206, data[begin:end], Content_Range=content_range, **generation_headers)

    def _list(self):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        begin, end = (self.query.get(f"{side}Offset", "") for side in ("start", "end"))
        items, prefixes = [], {}
        if self.bucket == "missing":
            raise KeyError(self.bucket)
        for name in self.buckets.names(self.bucket):
            if not name.startswith(prefix) or name < begin or (end and name >= end):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if delimiter and found:
                prefixes[prefix + head + delimiter] = None
            else:
                items.append(self.buckets.about(self.bucket, name))
        self._json({"kind": "storage#objects", "items": items, "prefixes": [*prefixes]})

    def _post(self):
        if self.path.startswith("/batch"):
            return self._batch()
        if "upload_id" in self.query:
            return self._put()
        place = "/b/([^/]+)/o/([^/?]+)"
        if copied := re.search(f"{place}/(rewriteTo|copyTo){place}", self.path):
            bucket, name, how, onto, new = map(urllib.parse.unquote, copied.groups())
            about = self.buckets.write(onto, new, self.buckets.read(bucket, name, {})[0], {})
            return self._json({"done": True, "resource": about} if how == "rewriteTo" else about)
        if moved := re.search(f"{place}/moveTo/o/([^/?]+)", self.path):
            bucket, name, new = map(urllib.parse.unquote, moved.groups())
            about = self.buckets.write(bucket, new, self.buckets.read(bucket, name, {})[0], {})
            self.buckets.delete(bucket, name, {})
            return self._json(about)
        if "uploadType" not in self.query:
            return self._send(501)
        data, name, kind = self.body, self.name, self.query.get("uploadType")
        if kind == "resumable":
            name = name or json.loads(data)["name"]
            key = str(len(self.buckets.uploads))
            self.buckets.uploads[key] = self.bucket, name, dict(self.query), bytearray()
            host = self.headers["Host"]
            where = f"http://{host}/upload/storage/v1/b/{self.bucket}/o?upload_id={key}"
            return self._send(200, b"", Location=where)
        if kind == "multipart":
            about, content = _parts(self.headers["Content-Type"], data)
            name, data = name or json.loads(about)["name"], content
        return self._json(self.buckets.write(self.bucket, name, data, self.query))

    def _put(self):
        bucket, name, query, data = self.buckets.uploads[self.query["upload_id"]]
        data += self.body
        if self.headers.get("Content-Range", "/1").endswith("*"):
            return self._send(308, b"", Range=f"bytes=0-{len(data) - 1}")
        return self._json(self.buckets.write(bucket, name, bytes(data), query))

    def _delete(self):
        self.buckets.delete(self.bucket, self.name, self.query)
        self._send(204)

    def _batch(self):
        answers = []
        for part in _parts(self.headers["Content-Type"], self.body):
            found = re.search(rb"DELETE \S*/b/([^/]+)/o/([^\s?]+)", part)
            bucket, name = (urllib.parse.unquote(x.decode()) for x in found.groups())
            try:
                self.buckets.delete(bucket, name, {})
                status = "204 No Content"
            except KeyError:
                status = "404 Not Found"
            answers.append(f"Content-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n")
        text = "".join(f"--batch\r\n{answer}\r\n" for answer in answers) + "--batch--\r\n"
        self._send(200, text.encode(), Content_Type="multipart/mixed; boundary=batch")


def _parts(content_type, data):
    """Returns the parts of a multipart body. Some clients end lines with LF instead of CRLF."""
    boundary = re.search("boundary=[\"']?([^\"';]+)", content_type)[1].encode()
    pieces = data.split(b"--" + boundary)[1:-1]
    contents = (re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1] for piece in pieces)
    return [re.sub(rb"\r?\n\Z", b"", content) for content in contents]


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # the client has closed the connection
            super().handle_error(request, client_address)


def serve(port: int) -> Server:
    """Starts a server without objects on a port of localhost."""
    handler = type("Handler", (Handler,), {"buckets": Buckets()})
    server = Server(("localhost", port), handler)
    server.buckets = handler.buckets
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def environment(port: int) -> dict[str, str]:
    """Returns the environment variables that make the clients use the server."""
    url = f"http://localhost:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
