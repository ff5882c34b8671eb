# The agent's image: `docker build -t alertmedic .` (or podman, buildah). Debian slim with Python, the locked packages and
# the agent; no compiler, no pip and no shell script of ours in the result; any user may run it, with a read-only root.
#
# BASE is pinned by tag here; pin it by digest for a release: --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv --without-pip /opt/alertmedic && python3 -m venv /opt/build
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
# Everything by hash. The build's own tools stay behind in this stage.
RUN /opt/build/bin/pip --python /opt/alertmedic/bin/python install --require-hashes -r requirements.lock
COPY agent agent
COPY rules rules
COPY actions actions
COPY sandbox sandbox
RUN /opt/build/bin/pip --python /opt/alertmedic/bin/python install --no-deps . \
  && /opt/alertmedic/bin/python -m compileall -q /opt/alertmedic/lib
# The bill of materials, CycloneDX, of what is installed.
RUN /opt/build/bin/pip install cyclonedx-bom==7.5.0 \
  && /opt/build/bin/cyclonedx-py environment --output-format JSON --output-file /opt/alertmedic/sbom.cdx.json \
     /opt/alertmedic/bin/python

FROM ${BASE}
LABEL org.opencontainers.image.title="alertmedic" \
      org.opencontainers.image.description="An on-call agent for Prometheus" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/alertmedic /opt/alertmedic
ENV PATH=/opt/alertmedic/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/var/lib/alertmedic ALERTMEDIC_STATE_DIR=/var/lib/alertmedic
RUN mkdir -p /var/lib/alertmedic /etc/alertmedic && chown 10001:10001 /var/lib/alertmedic
USER 10001:10001
EXPOSE 9095
ENTRYPOINT ["alertmedic"]
CMD ["serve"]
