//! Network namespaces: a machine's worth of network for each node, with links that can be cut in
//! one direction. Needs root, as `ip netns` and `iptables` do.

use std::net::IpAddr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

fn run(command: &str) -> Result<()> {
    let mut words = command.split(' ');
    let program = words.next().unwrap_or_default();
    let out = Command::new(program)
        .args(words)
        .output()
        .with_context(|| command.to_string())?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{command}: {said}");
    Ok(())
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Namespaces on one bridge, which this process reaches too.
pub struct Network {
    id: u32,
    count: usize,
}

impl Network {
    pub fn new(count: usize) -> Result<Self> {
        // Names of its own: the kernel takes a moment to remove a namespace's links.
        let network = Network {
            id: std::process::id() % 1000 * 10 + NEXT.fetch_add(1, Ordering::Relaxed) % 10,
            count,
        };
        network.undo();
        let bridge = network.bridge();
        run(&format!("ip link add {bridge} type bridge"))?;
        run(&format!(
            "ip addr add {}/24 dev {bridge}",
            network.ip(255 - 2)
        ))?;
        run(&format!("ip link set {bridge} up"))?;
        for n in 0..count {
            let (space, link) = (network.space(n), network.link(n));
            run(&format!("ip netns add {space}"))?;
            run(&format!(
                "ip link add {link} type veth peer name eth0 netns {space}"
            ))?;
            run(&format!("ip link set {link} master {bridge} up"))?;
            run(&format!(
                "ip -n {space} addr add {}/24 dev eth0",
                network.ip(n)
            ))?;
            run(&format!("ip -n {space} link set eth0 up"))?;
            run(&format!("ip -n {space} link set lo up"))?;
        }
        Ok(network)
    }

    fn bridge(&self) -> String {
        format!("hf{}br", self.id)
    }

    fn link(&self, n: usize) -> String {
        format!("hf{}v{n}", self.id)
    }

    fn space(&self, n: usize) -> String {
        format!("hf{}n{n}", self.id)
    }

    /// Address of namespace `n`.
    pub fn ip(&self, n: usize) -> IpAddr {
        IpAddr::from([10, 213, (self.id % 250) as u8, n as u8 + 1])
    }

    /// What runs a program in namespace `n`.
    pub fn wrapper(&self, n: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.space(n)]
            .map(String::from)
            .to_vec()
    }

    fn table(&self, n: usize, rule: &str) -> Result<()> {
        run(&format!("ip netns exec {} iptables {rule}", self.space(n)))
    }

    /// From now on nothing that `from` sends arrives at `to`.
    pub fn cut(&self, from: usize, to: usize) -> Result<()> {
        self.table(to, &format!("-A INPUT -s {} -j DROP", self.ip(from)))
    }

    pub fn cut_both(&self, a: usize, b: usize) -> Result<()> {
        self.cut(a, b)?;
        self.cut(b, a)
    }

    pub fn heal(&self) -> Result<()> {
        (0..self.count).try_for_each(|n| self.table(n, "-F INPUT"))
    }

    fn undo(&self) {
        // What is not there is no error here.
        for n in 0..self.count {
            let _ = run(&format!("ip netns del {}", self.space(n)));
            let _ = run(&format!("ip link del {}", self.link(n)));
        }
        let _ = run(&format!("ip link del {}", self.bridge()));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.undo();
    }
}
