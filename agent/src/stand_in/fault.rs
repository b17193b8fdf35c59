//! Faults, and the words for them.

use std::time::Duration;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    Panic(String),
    Park(String),
    Crash,
    Hang,
    AgentHang,
    /// Whether its guardian is kept from starting it again.
    AgentExit {
        stay: bool,
    },
    /// The agent is never started. At boot only.
    NeverServe,
    PulseStop,
    Agent(Manner),
    Recover,
}

/// How the agent treats who talks to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Normal,
    /// Answers so many milliseconds late.
    Slow(u32),
    Lie,
    Flood,
    DieMidMessage,
    HalfOpen,
}

/// Bytes of a [`Manner`] on the pipe to the agent.
pub const MANNER_SIZE: usize = 5;

impl Manner {
    pub fn encode(self) -> [u8; MANNER_SIZE] {
        let (code, value) = match self {
            Manner::Normal => (0, 0),
            Manner::Slow(ms) => (1, ms),
            Manner::Lie => (2, 0),
            Manner::Flood => (3, 0),
            Manner::DieMidMessage => (4, 0),
            Manner::HalfOpen => (5, 0),
        };
        let [a, b, c, d] = u32::to_le_bytes(value);
        [code, a, b, c, d]
    }

    pub fn decode([code, value @ ..]: [u8; MANNER_SIZE]) -> Option<Manner> {
        match code {
            0 => Some(Manner::Normal),
            1 => Some(Manner::Slow(u32::from_le_bytes(value))),
            2 => Some(Manner::Lie),
            3 => Some(Manner::Flood),
            4 => Some(Manner::DieMidMessage),
            5 => Some(Manner::HalfOpen),
            _ => None,
        }
    }
}

impl Fault {
    /// Read a fault as the command line of `kmorph-agent fault` has it.
    pub fn parse(text: &str) -> Result<Fault, String> {
        let (name, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let rest = rest.trim();
        let or = |default: &str| if rest.is_empty() { default.to_owned() } else { rest.to_owned() };
        let fault = match name {
            "panic" => return Ok(Fault::Panic(or("a panic that was asked for"))),
            "park" => return Ok(Fault::Park(or("a halt that was asked for"))),
            "slow" => {
                let ms = rest.parse().map_err(|_| format!("slow needs milliseconds, not {rest:?}"))?;
                return Ok(Fault::Agent(Manner::Slow(ms)));
            }
            "agent-exit" if rest == "stay" => return Ok(Fault::AgentExit { stay: true }),
            "crash" => Fault::Crash,
            "hang" => Fault::Hang,
            "agent-hang" => Fault::AgentHang,
            "agent-exit" => Fault::AgentExit { stay: false },
            "lie" => Fault::Agent(Manner::Lie),
            "flood" => Fault::Agent(Manner::Flood),
            "die-mid-message" => Fault::Agent(Manner::DieMidMessage),
            "half-open" => Fault::Agent(Manner::HalfOpen),
            "pulse-stop" => Fault::PulseStop,
            "recover" => Fault::Recover,
            "never-serve" => {
                return Err(
                    "never-serve is for a start: put kmorph.fault=never-serve on the command line".into()
                );
            }
            _ => return Err(format!("there is no fault {name:?}; kmorph-agent --help lists them")),
        };
        if rest.is_empty() { Ok(fault) } else { Err(format!("{name} takes no {rest:?}")) }
    }

    /// The faults a kernel command line orders, and when; what cannot be read is said and left out.
    pub fn of_cmdline(line: &str) -> (Vec<(Duration, Fault)>, Vec<String>) {
        let (mut faults, mut wrong) = (vec![], vec![]);
        let words = line.split_ascii_whitespace().take_while(|w| *w != "--");
        for word in words.filter_map(|w| w.strip_prefix("kmorph.fault=")) {
            let (what, after) = word.rsplit_once('@').unwrap_or((word, "0ms"));
            let fault = match what {
                "never-serve" => Ok(Fault::NeverServe),
                what => Fault::parse(&what.replace(':', " ")),
            };
            match fault.and_then(|f| Ok((time(after)?, f))) {
                Ok(fault) => faults.push(fault),
                Err(why) => wrong.push(format!("kmorph.fault={word}: {why}")),
            }
        }
        faults.sort_by_key(|(after, _)| *after);
        (faults, wrong)
    }
}

fn time(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no time; write 200ms or 2s");
    let (digits, unit) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1000),
        (None, None) => return Err(bad()),
    };
    let n: u32 = digits.parse().map_err(|_| bad())?;
    Ok(Duration::from_millis(u64::from(n) * unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_or_refused() {
        for (text, want) in [
            ("panic", Fault::Panic("a panic that was asked for".into())),
            ("panic out of luck", Fault::Panic("out of luck".into())),
            (" park reboot ", Fault::Park("reboot".into())),
            ("slow 300", Fault::Agent(Manner::Slow(300))),
            ("agent-exit", Fault::AgentExit { stay: false }),
            ("agent-exit stay", Fault::AgentExit { stay: true }),
            ("recover", Fault::Recover),
        ] {
            assert_eq!(Fault::parse(text), Ok(want), "{text}");
        }
        for (text, why) in [
            ("", "no fault"),
            ("boom", "\"boom\""),
            ("slow", "milliseconds"),
            ("slow -1", "milliseconds"),
            ("crash now", "\"now\""),
            ("never-serve", "for a start"),
        ] {
            let e = Fault::parse(text).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn a_command_line_orders_faults_in_time() {
        let line = "quiet kmorph.fault=crash@2s kmorph.fault=panic:no:luck@200ms kmorph.fault=never-serve \
                    kmorph.fault=boom kmorph.fault=crash@soon -- kmorph.fault=hang";
        let (faults, wrong) = Fault::of_cmdline(line);
        let ms = Duration::from_millis;
        assert_eq!(
            faults,
            [(ms(0), Fault::NeverServe), (ms(200), Fault::Panic("no luck".into())), (ms(2000), Fault::Crash)]
        );
        assert!(wrong.len() == 2 && wrong[0].contains("boom") && wrong[1].contains("soon"), "{wrong:?}");
    }

    #[test]
    fn manners_come_back() {
        use Manner::*;
        for m in [Normal, Slow(u32::MAX), Lie, Flood, DieMidMessage, HalfOpen] {
            assert_eq!(Manner::decode(m.encode()), Some(m));
        }
        assert_eq!(Manner::decode([9; 5]), None);
    }
}
