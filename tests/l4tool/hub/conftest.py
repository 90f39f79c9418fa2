from tests.l4tool.hub.hub_fixtures import cache, server, source  # noqa: F401
