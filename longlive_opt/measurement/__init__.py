"""From a pipeline to one result: protocol, metrics, schema, fidelity, decision."""
