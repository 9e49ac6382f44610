"""Two deployments make the application: replicas of the engine, and the ingress in front of them."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from dgemma_ext.integrations.ray.ingress import Ingress
from dgemma_ext.integrations.ray.replica import Replica
from dgemma_ext.integrations.ray.settings import RaySettings
from dgemma_ext.serve import ServeOptions

# An ingress holds a request until it is answered; what bounds them is how many the replicas take.
_MOST_AT_INGRESS = 10_000
# Seconds. A replica's loop answers at once unless it is gone.
_HEALTH_PERIOD, _HEALTH_TIMEOUT = 5.0, 30.0
# Seconds that an ingress outlives the replicas that still answer its requests.
_LONGER = 10.0


def application(settings: RaySettings, options: ServeOptions) -> Application:
    """The application: what a replica cannot hold waits at the ingress, and what that cannot hold is status 429."""
    if settings.autoscaling_config is None:
        scale: dict[str, Any] = {"num_replicas": settings.num_replicas or 1}
    else:
        config = {"target_ongoing_requests": options.max_batch, **settings.autoscaling_config}
        scale = {"autoscaling_config": config}
    engine = serve.deployment(Replica).options(
        name="Engine",
        ray_actor_options=dict(settings.ray_actor_options or {}),
        max_ongoing_requests=options.max_batch + options.max_waiting,
        max_queued_requests=max(1, options.max_waiting),
        graceful_shutdown_timeout_s=options.drain_timeout,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=_HEALTH_PERIOD,
        health_check_timeout_s=_HEALTH_TIMEOUT,
        request_router_config=RequestRouterConfig(
            request_router_class="dgemma_ext.integrations.ray.router.ConversationRouter",
            request_router_kwargs={"slots": options.max_batch},
        ),
        **scale,
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=_MOST_AT_INGRESS,
        graceful_shutdown_timeout_s=options.drain_timeout + _LONGER,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return ingress.bind(engine.bind(settings.loading, options), options)
