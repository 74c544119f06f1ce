"""A simulator of routing: the router's own policies, costs and bookings, on modelled replicas."""
