//! Direction of payload, and pairs with one value per direction.

use std::ops::{Index, IndexMut};

/// Direction of payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the container.
    In,
    /// From the container.
    Out,
}

impl Direction {
    /// All directions.
    pub const ALL: [Self; 2] = [Self::In, Self::Out];

    /// The label value in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }

    /// The opposite direction.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::In => Self::Out,
            Self::Out => Self::In,
        }
    }
}

/// A value for each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerDirection<T> {
    /// To the container.
    pub inbound: T,
    /// From the container.
    pub outbound: T,
}

impl<T> PerDirection<T> {
    /// Calls `value` once for each direction.
    pub fn new(mut value: impl FnMut(Direction) -> T) -> Self {
        Self { inbound: value(Direction::In), outbound: value(Direction::Out) }
    }

    /// The values of both directions.
    pub fn values(&self) -> [&T; 2] {
        [&self.inbound, &self.outbound]
    }
}

impl<T> Index<Direction> for PerDirection<T> {
    type Output = T;

    fn index(&self, direction: Direction) -> &T {
        match direction {
            Direction::In => &self.inbound,
            Direction::Out => &self.outbound,
        }
    }
}

impl<T> IndexMut<Direction> for PerDirection<T> {
    fn index_mut(&mut self, direction: Direction) -> &mut T {
        match direction {
            Direction::In => &mut self.inbound,
            Direction::Out => &mut self.outbound,
        }
    }
}
