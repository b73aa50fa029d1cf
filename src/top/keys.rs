//! Key bindings.

use super::sheet::View;
use super::state::{LONGEST_FILTER, State};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

/// Rows that page keys scroll by. The height of the terminal is not known here.
const PAGE: usize = 10;

impl State {
    /// Handles a key. Returns false if it ends the program.
    pub(crate) fn press(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return true;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return !matches!(key.code, KeyCode::Char('c'));
        }
        if self.typing {
            self.type_filter(key.code);
            return true;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Tab | KeyCode::Right | KeyCode::Char('l') => self.select(self.view.step(1)),
            KeyCode::BackTab | KeyCode::Left | KeyCode::Char('h') => {
                self.select(self.view.step(View::ALL.len() - 1));
            }
            KeyCode::Char(digit @ '1'..='4') => {
                self.select(View::ALL[digit as usize - '1' as usize]);
            }
            KeyCode::Char('s') => self.sort(1),
            KeyCode::Char('S') => self.sort(self.view.columns().len() - 1),
            KeyCode::Char('r') => self.order.reversed = !self.order.reversed,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Down | KeyCode::Char('j') => self.scroll = self.scroll.saturating_add(1),
            KeyCode::Up | KeyCode::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::PageDown | KeyCode::Char(' ') => {
                self.scroll = self.scroll.saturating_add(PAGE);
            }
            KeyCode::PageUp => self.scroll = self.scroll.saturating_sub(PAGE),
            KeyCode::Home | KeyCode::Char('g') => self.scroll = 0,
            KeyCode::End | KeyCode::Char('G') => self.scroll = usize::MAX,
            _ => {}
        }
        // Scrolling stops at the last row.
        self.scroll = self.scroll.min(self.sheet().rows.len().saturating_sub(1));
        true
    }

    fn select(&mut self, view: View) {
        self.view = view;
        self.scroll = 0;
    }

    /// Sorts by the column `steps` to the right of the current one.
    fn sort(&mut self, steps: usize) {
        let columns = self.view.columns();
        let now = columns.iter().position(|column| column.key == self.order.key);
        let next = now.map_or(0, |now| (now + steps) % columns.len());
        self.order.key = columns[next].key;
        self.order.reversed = false;
        self.scroll = 0;
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => {
                self.typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(c) if !c.is_control() && self.filter.chars().count() < LONGEST_FILTER => {
                self.filter.push(c);
            }
            _ => {}
        }
        self.scroll = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::super::rates::tests::figures;
    use super::super::sheet::Order;
    use super::*;
    use std::time::Duration;

    fn state() -> State {
        State::new(
            View::Ports,
            Order::default(),
            String::new(),
            Duration::from_secs(2),
            figures(1000, 1),
        )
    }

    fn press(state: &mut State, code: KeyCode) -> bool {
        state.press(code.into())
    }

    fn type_in(state: &mut State, text: &str) {
        text.chars().for_each(|c| assert!(press(state, KeyCode::Char(c))));
    }

    #[test]
    fn q_esc_and_ctrl_c_quit_except_while_a_filter_is_typed() {
        let mut state = state();
        assert!(!press(&mut state, KeyCode::Char('q')));
        assert!(!press(&mut state, KeyCode::Esc));
        type_in(&mut state, "/q");
        assert_eq!((state.typing, state.filter.as_str()), (true, "q"));
        assert!(press(&mut state, KeyCode::Esc));
        assert_eq!((state.typing, state.filter.as_str()), (false, ""));
        type_in(&mut state, "/");
        assert!(!state.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }

    #[test]
    fn views_wrap_around_and_are_selected_by_number() {
        let mut state = state();
        press(&mut state, KeyCode::Tab);
        assert_eq!(state.view, View::Endpoints);
        press(&mut state, KeyCode::Left);
        press(&mut state, KeyCode::Left);
        assert_eq!(state.view, View::Names);
        press(&mut state, KeyCode::Right);
        assert_eq!(state.view, View::Ports);
        press(&mut state, KeyCode::Char('3'));
        assert_eq!(state.view, View::Networks);
    }

    #[test]
    fn the_sort_column_moves_and_reverses() {
        let mut state = state();
        press(&mut state, KeyCode::Char('s'));
        assert_eq!(state.order.key, "fail");
        press(&mut state, KeyCode::Char('S'));
        press(&mut state, KeyCode::Char('S'));
        assert_eq!(state.order, Order { key: "in", reversed: false });
        press(&mut state, KeyCode::Char('r'));
        assert!(state.order.reversed);
        // A view without that column starts at its first one.
        press(&mut state, KeyCode::Char('4'));
        press(&mut state, KeyCode::Char('s'));
        assert_eq!(state.order.key, "server");
    }

    #[test]
    fn the_filter_is_edited_and_bounded_and_scrolling_stops_at_the_last_row() {
        let mut state = state();
        type_in(&mut state, "/webx");
        press(&mut state, KeyCode::Backspace);
        press(&mut state, KeyCode::Enter);
        assert_eq!((state.typing, state.filter.as_str()), (false, "web"));
        press(&mut state, KeyCode::End);
        assert_eq!(state.scroll, 1);
        press(&mut state, KeyCode::PageDown);
        assert_eq!(state.scroll, 1);
        press(&mut state, KeyCode::Up);
        press(&mut state, KeyCode::Up);
        assert_eq!(state.scroll, 0);
        type_in(&mut state, "/");
        type_in(&mut state, &"ä".repeat(1000));
        assert_eq!(state.filter.chars().count(), LONGEST_FILTER);
    }
}
