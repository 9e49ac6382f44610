"""The interfaces' requests and answers, as models that check them and describe them in /openapi.json."""
