"""The processes of the fleet: the coordinator, the workers of the stage services, and the command line."""
